"""Renders each line of one-liners.txt as transformers does and writes the results to one-liners.json.

`⏎` and `␍` stand for line ends; a line that begins with `#` names what follows. The names in VARIABLES are set first, but where
blanks are the matter.
"""

import datetime
import json
from pathlib import Path

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

MESSAGES = [{"role": "system", "content": "Sys"}, {"role": "user", "content": "Hello big world"}]
VARIABLES = """
{%- set d = {'b': 1, 'a': [2, none, true, 1.5, "x'y"]} %}
{%- set l = [3, 1, 2] %}{% set s = 'Hello big world' %}{% set u8 = 'Straße ÉCOLE ßmağ ١²½' %}
{%- set ps = [{'n': 'b', 'v': 2}, {'n': 'a', 'v': 1}, {'n': 'B', 'v': 3}] %}
{%- set ws = '  a\\tb \\n c  ' %}{% set nl = 'a\\nb\\r\\nc\\n\\nd' %}"""


class Generation(jinja2.ext.Extension):
    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return nodes.CallBlock(self.call_method("said"), [], [], body).set_lineno(line)

    def said(self, caller):
        return caller()


def raise_exception(message):
    raise jinja2.exceptions.TemplateError(message)


def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def render(environment, template):
    names = {"messages": MESSAGES, "add_generation_prompt": True, "bos_token": "<s>", "eos_token": "</s>"}
    try:
        return environment.from_string(template).render(**names, tools=None, documents=None)
    except Exception:
        return None


environment = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
)
environment.filters["tojson"] = tojson
environment.globals["raise_exception"] = raise_exception
environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)

here = Path(__file__).parent
results, blanks = [], False
for line in (here / "one-liners.txt").read_text(encoding="utf8").split("\n"):
    if line.startswith("#"):
        blanks = "whitespace" in line
    elif line:
        template = line.replace("⏎", "\n").replace("␍", "\r")
        template = template if blanks else VARIABLES + template
        results.append([line, not blanks, render(environment, template)])
out = ",\n".join(json.dumps(result, ensure_ascii=False) for result in results)
(here / "one-liners.json").write_text(
    f'{{"variables": {json.dumps(VARIABLES, ensure_ascii=False)}, "results": [\n{out}\n]}}\n', encoding="utf8"
)
