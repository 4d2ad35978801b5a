"""Renders the templates of this folder as transformers does and writes the results beside them."""

import json
import sys
from pathlib import Path

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

TOKENS = {
    "llama-2": ("<s>", "</s>"),
    "llama-3": ("<|begin_of_text|>", "<|eot_id|>"),
    "mistral": ("<s>", "</s>"),
    "zephyr": ("<s>", "</s>"),
    "chatml": ("<s>", "<|im_end|>"),
}


def says(role, content):
    return {"role": role, "content": content}


USER = says("user", "What is the sea?")
SYSTEM = says("system", "You are a sailor.\nBe brief.")
ANSWER = says("assistant", "Salt water, and much of it.")
TURNS = [USER, ANSWER, says("user", "And a lake?"), says("assistant", "Sweet water."), says("user", "A tear?")]
CONVERSATIONS = {
    "user": [USER],
    "system and user": [SYSTEM, USER],
    "answered": [USER, ANSWER],
    "three turns": TURNS,
    "system and three turns": [SYSTEM, *TURNS],
    "blanks": [says("system", "  s\t"), says("user", "  \n hi \n"), says("assistant", "\n ho  "), says("user", " \t")],
    "quotes": [says("user", "it's \"so\" \\n {{ x }} <b>&amp;</b> {% if %}"), says("assistant", "'"), USER],
    "unicode": [says("user", "Grüße, 你好 🦀 \u00a0é"), says("assistant", "\u00a0ñ\u2003"), says("user", "\u3000?")],
    "empty": [says("user", ""), says("assistant", ""), says("user", "")],
    "two of a user": [USER, USER],
    "assistant first": [ANSWER, USER],
    "unknown role": [USER, says("tool", "4")],
    "system in the middle": [USER, ANSWER, SYSTEM, USER],
}


def raise_exception(message):
    raise jinja2.exceptions.TemplateError(message)


def case(template, tokens, name, messages, prompt):
    out = {"name": name, "messages": messages, "add_generation_prompt": prompt}
    values = {"bos_token": tokens[0], "eos_token": tokens[1], "tools": None, "documents": None}
    try:
        out["text"] = template.render(messages=messages, add_generation_prompt=prompt, **values)
    except jinja2.exceptions.TemplateError as e:
        out["error"] = str(e)
    return out


def main(folder):
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols])
    env.globals["raise_exception"] = raise_exception
    for name, tokens in TOKENS.items():
        template = env.from_string((folder / f"{name}.jinja").read_text(encoding="utf-8"))
        cases = [case(template, tokens, *c, prompt) for c in CONVERSATIONS.items() for prompt in (False, True)]
        golden = {"bos_token": tokens[0], "eos_token": tokens[1], "cases": cases}
        text = json.dumps(golden, ensure_ascii=False, indent=1) + "\n"
        (folder / f"{name}.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
