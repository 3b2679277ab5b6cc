"""Chat templates: what templates on the hub rely on, and what they must not be able to do."""

import threading
import time

import pytest

from shoal.checkpoint import chat_template
from shoal.checkpoint.chat_template import ChatTemplate, TemplateError

MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]


def render(source, messages=MESSAGES, tools=None, **variables):
    return ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"}).render(messages, tools, **variables)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ bos_token }}{% for m in messages %}{{ m.role }}:{{ m['content'] }}{{ eos_token }}{% endfor %}",
         "<s>user:Hi</s>assistant:Ho</s>"),
        # Blocks are trimmed: neither their indentation nor the newline after them is text.
        ("{% for m in messages %}\n    {% if true %}\n{{ m.content }}\n    {% endif %}\n{% endfor %}\nend",
         "Hi\nHo\nend"),
        ("{% for m in messages %}{% if loop.index == 2 %}{% break %}{% endif %}{{ m.content }}{% endfor %}", "Hi"),
        ("{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.content }}{% endfor %}", "Ho"),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "2"),
        ("{% macro f(m) %}[{{ m.content }}]{% endmacro %}{% for m in messages %}{{ f(m) }}{% endfor %}", "[Hi][Ho]"),
        ("{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}", "HiHo"),
        ("{{ messages | map(attribute='content') | join('-') }}{{ 'x'.upper() }}", "Hi-HoX"),
        ("{{ tools is none }}{{ documents is none }}{{ add_generation_prompt }}", "TrueTrueTrue"),
        ("{{ thinking | default('off') }}{{ unknown }}", "off"),
    ],
)  # fmt: skip
def test_what_templates_rely_on(source, text):
    assert render(source) == text


def test_tojson_keeps_text_as_it_is():
    tools = [{"b": "<é> & 'x'", "a": 1}]
    assert render("{{ tools | tojson }}", tools=tools) == '[{"b": "<é> & \'x\'", "a": 1}]'
    assert render("{{ tools[0] | tojson(indent=2) }}", tools=tools) == '{\n  "b": "<é> & \'x\'",\n  "a": 1\n}'
    assert render("{{ tools[0] | tojson(separators=(',', ':'), sort_keys=true) }}", tools=tools) == (
        '{"a":1,"b":"<é> & \'x\'"}'
    )


def test_variables_reach_the_template_but_not_the_callers_arguments():
    assert render("{{ thinking }} {{ self_ }}", thinking=True, self_=1) == "True 1"
    variables = {"self": "me", "_shoal_deadline": 0.0, "bos_token": "<other>"}
    assert ChatTemplate("{{ bos_token }}{{ messages | length }}", {"bos_token": "<s>"}).render(
        MESSAGES, None, **variables
    ) == ("<other>2")


def test_strftime_now():
    assert render("{{ strftime_now('%Y') }}").isdigit()


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "^roles must alternate$"),
        ("{{ messages[7].content + 'x' }}", "failed on these messages"),
        ("{{ messages.content.text }}", "failed on these messages"),
        ("{{ 1 // 0 }}", "failed on these messages"),
        ("{{ messages[0].content + 1 }}", "failed on these messages"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe|not safely"),
        ("{% include 'file' %}", "failed on these messages"),
        ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "nested too deeply"),
        ("{% for m in messages %}", "does not parse"),
    ],
)
def test_failures_are_template_errors(source, reason):
    with pytest.raises(TemplateError, match=reason):
        render(source)


@pytest.mark.parametrize(
    "source",
    [
        "{% set r = range(99999) %}{% for a in r %}{% for b in r %}{% for c in r %}" + "{% endfor %}" * 3,
        "{% macro f(n) %}{% for i in range(9999) %}{% if n %}{{ f(n - 1) }}{% endif %}{% endfor %}{% endmacro %}"
        "{{ f(9) }}",
    ],
)
def test_time_is_bounded(monkeypatch, source):
    monkeypatch.setattr(chat_template, "MAX_SECONDS", 0.1)
    failures = []

    def work():
        try:
            render(source)
        except TemplateError as error:
            failures.append(str(error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    assert failures == ["the chat template took longer than 0.1 s"]


def test_output_is_bounded(monkeypatch):
    monkeypatch.setattr(chat_template, "MAX_CHARACTERS", 1000)
    with pytest.raises(TemplateError, match="more than 1000 characters"):
        render("{% for i in range(100000) %}{{ i }}{% endfor %}")


def test_a_template_keeps_no_deadline_from_one_rendering_to_the_next(monkeypatch):
    monkeypatch.setattr(chat_template, "MAX_SECONDS", 0.05)
    template = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}", {})
    assert template.render(MESSAGES) == "HiHo"
    time.sleep(0.1)
    assert template.render(MESSAGES) == "HiHo"
