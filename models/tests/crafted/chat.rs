//! Chat templates that run, make or nest too much.

use crate::{bounded, memory, refused};
use candle_sparse_models::chat::{Chat, ChatTemplate, Message};

fn ends(what: &str, source: &str) {
    let messages = [Message::user("Hello"), Message::assistant("Hi"), Message::user("y".repeat(10_000))];
    let result =
        bounded(what, source.len(), || ChatTemplate::new(source, "<s>", "</s>")?.render(&messages, true));
    if let Err(e) = result {
        let e = e.to_string();
        assert!(e.len() < 1000 && !e.contains(char::is_control), "{what}: {e}");
    }
}

fn makes_too_much(source: &str) {
    let messages = [Message::user("y".repeat(10_000))];
    refused(source, source.len(), "the chat template fails", || {
        ChatTemplate::new(source, "<s>", "</s>")?.render(&messages, true)
    });
}

fn again(start: &str, step: &str, times: usize) -> String {
    format!(
        "{{% set ns = namespace(s={start}) %}}{{% for i in range({times}) %}}{{% set ns.s = {step} %}}{{% endfor %}}{{{{ ns.s }}}}"
    )
}

#[test]
fn gigabytes() {
    let _alone = memory::alone();
    for source in [
        "{{ '%99999999d' | format(1) }}",
        "{{ '%99999999d%99999999d%99999999d%99999999d' | format(1, 1, 1, 1) }}",
        "{{ '%*d' | format(999999999, 1) }}",
        "{{ '%.999999999f' | format(1.0) }}",
        "{{ '{:999999999}'.format(1) }}",
        "{{ '{:{}}'.format(1, 999999999) }}",
        "{{ '{0}'.format('x' * 10**9) }}",
        "{{ 'x' * 10**9 }}",
        "{{ 10**9 * 'x' }}",
        "{{ [0] * 10**9 }}",
        "{{ 'a'.ljust(10**9) }}",
        "{{ 'a'.rjust(10**9) }}",
        "{{ 'a'.center(10**9) }}",
        "{{ 'a'.zfill(10**9) }}",
        "{{ 'a\tb'.expandtabs(10**9) }}",
        "{{ 'a'|center(10**9) }}",
        "{{ 'a\\na'|indent(10**9) }}",
        "{{ range(10**9)|list }}",
        "{{ range(10**5)|list|tojson(indent=10**8) }}",
        "{{ [1, 2]|batch(10**9, 'x')|list }}",
        "{{ [1, 2]|slice(10**9)|list }}",
        "{{ messages[0].content.replace('', messages[0].content) }}",
        "{{ messages[0].content|replace('y', messages[0].content) }}",
        "{{ messages[0].content.join(messages[0].content.split('')|list + messages[0].content|list) }}",
        "{{ messages[0].content.join(messages[0].content|list) }}",
        "{{ 10 ** 10000 }}",
    ] {
        makes_too_much(source);
    }
    for (start, step) in [
        ("'xxxx'", "ns.s ~ ns.s"),
        ("'xxxx'", "ns.s + ns.s"),
        ("'xxxx'", "[ns.s, ns.s]|join"),
        ("'xxxx'", "''.join([ns.s, ns.s])"),
        ("'xxxx'", "'%s%s' | format(ns.s, ns.s)"),
        ("'xxxx'", "'{0}{0}'.format(ns.s)"),
        ("'xxxx'", "ns.s|replace('x', 'xx')"),
        ("'xxxx'", "ns.s.replace('x', 'xx')"),
        ("'xxxx'", "ns.s * 2"),
        ("'\"\"'", "ns.s|tojson"),
        ("'\"\"'", "ns.s|string|tojson|tojson"),
        ("[1]", "ns.s + ns.s"),
        ("[1]", "ns.s * 2"),
        ("[1]", "[ns.s, ns.s]"),
        ("[1]", "ns.s|string|list"),
        ("{}", "{'a': ns.s, 'b': ns.s}"),
        ("'xxxx'", "ns.s|list + ns.s|list"),
        ("'xxxx'", "(ns.s ~ ns.s)|title|upper|trim|capitalize"),
    ] {
        makes_too_much(&again(start, step, 99));
    }
}

#[test]
fn what_nests_calls_or_loops_without_end() {
    let _alone = memory::alone();
    let deep = |open: &str, inner: &str, close: &str, n: usize| {
        format!("{}{inner}{}", open.repeat(n), close.repeat(n))
    };
    let long = "y".repeat(100_000);
    for (what, source) in [
        ("if", deep("{% if 1 %}", "x", "{% endif %}", 50_000)),
        ("for", deep("{% for a in [1] %}", "x", "{% endfor %}", 50_000)),
        ("set", deep("{% set x %}", "x", "{% endset %}", 50_000)),
        ("macro", deep("{% macro x() %}", "x", "{% endmacro %}", 50_000)),
        ("filter", deep("{% filter upper %}", "x", "{% endfilter %}", 50_000)),
        ("lists", deep("{{ ", &deep("[", "1", "]", 50_000), " }}", 1)),
        ("dicts", deep("{{ ", &deep("{'a':", "1", "}", 50_000), " }}", 1)),
        ("not", format!("{{{{ {} 1 }}}}", "not ".repeat(50_000))),
        ("minus", format!("{{{{ {} 1 }}}}", "-".repeat(50_000))),
        ("if else", format!("{{{{ {} 1 }}}}", "1 if 0 else ".repeat(50_000))),
        ("filters", format!("{{{{ 'a'{} }}}}", "|upper".repeat(50_000))),
        ("attributes", format!("{{{{ a{} }}}}", ".b".repeat(50_000))),
        ("subscripts", format!("{{{{ a{} }}}}", "[0]".repeat(50_000))),
        ("calls", format!("{{{{ a{} }}}}", "()".repeat(50_000))),
        ("tildes", format!("{{{{ 1{} }}}}", "~1".repeat(50_000))),
        ("powers", format!("{{{{ 1{} }}}}", "**1".repeat(50_000))),
        ("and", format!("{{{{ 1{} }}}}", " and 1".repeat(50_000))),
        ("elif", format!("{{% if 0 %}}{}{{% endif %}}", "{% elif 0 %}".repeat(50_000))),
        ("arguments", format!("{{{{ range({}1) }}}}", "1,".repeat(100_000))),
        ("recursion", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}".into()),
        ("two macros", "{% macro f() %}{{ g() }}{% endmacro %}{% macro g() %}{{ f() }}{% endmacro %}{{ f() }}".into()),
        ("caller", "{% macro f() %}{{ caller() }}{% endmacro %}{% call f() %}{% call f() %}{% endcall %}{% endcall %}".into()),
        ("recursive loop", "{% for a in [1] recursive %}{{ loop([1]) }}{% endfor %}".into()),
        ("loops", "{% for a in range(10000) %}{% for b in range(10000) %}{% endfor %}{% endfor %}".into()),
        ("include", "{% include 'chat_template' %}".into()),
        ("extends", "{% extends 'chat_template' %}".into()),
        ("import", "{% import 'chat_template' as x %}{{ x }}".into()),
        ("self", "{{ self }}{{ self.x() }}{% block x %}{{ self.x() }}{% endblock %}".into()),
        ("super", "{% block x %}{{ super() }}{% endblock %}".into()),
        ("files", "{% include '/etc/passwd' %}".into()),
        ("a long name", format!("{{{{ {long}() }}}}")),
        ("a long refusal", format!("{{{{ raise_exception('{long}') }}}}")),
        ("a refusal that steers a screen", "{{ raise_exception('\\x1b[2J\\nb\\x07') }}".into()),
        ("strftime", "{{ strftime_now('%99999999Y') }}{{ strftime_now('%' * 100000) }}".into()),
        ("sort", "{{ (messages[2].content|list)|sort|unique|groupby(0)|map('upper')|list }}".into()),
        ("no end", "{% for".into()),
        ("comment", "{#".repeat(100_000)),
        ("raw", "{% raw %}".repeat(10_000)),
        ("not text", "{{ '\\ud800' }}{{ '\\xff' }}{{ \"\\u{0}\" }}".into()),
        ("numbers", "{{ 9**99 }}{{ 170141183460469231731687303715884105727 + 1 }}{{ (-170141183460469231731687303715884105727 - 1) // -1 }}{{ (-9223372036854775807 - 1) % -1 }}{{ 1 // 0 }}".into()),
        ("division", "{{ (-9223372036854775807 - 1) // -1 }}{{ (-9223372036854775807 - 1) * -1 }}{{ (-9223372036854775807 - 1)|abs }}".into()),
        ("slices", "{{ 'abc'[-9223372036854775807:9223372036854775807:9223372036854775807] }}{{ 'abc'[::-9223372036854775807] }}{{ range(-9223372036854775807, 9223372036854775807, 1)|length }}".into()),
    ] {
        ends(what, &source);
    }
}

#[test]
fn what_users_and_models_write() {
    let _alone = memory::alone();
    let source = "{% for m in messages %}<|{{ m.role }}|>{{ m.content|trim }}</s>{% endfor %}<|assistant|>";
    let mut chat = Chat::new(ChatTemplate::new(source, "<s>", "</s>").unwrap(), Some("{{ 1/0 }}"));
    let turn = bounded("a prompt that looks like a template", 5_000_000, || {
        let turn = chat.say(&"{% for x in range(10**9) %}".repeat(100_000))?;
        chat.answered(&"{{".repeat(1_000_000), None);
        chat.say("\u{e000}0\u{e001}").map(|last| (turn, last))
    });
    let (first, last) = turn.unwrap();
    assert!(first.text.contains("{{ 1/0 }}"), "{}", &first.text[..100]);
    assert!(last.continues, "{}", &last.text[..100]);
}
