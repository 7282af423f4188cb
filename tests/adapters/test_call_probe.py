"""The form of a template's calls is used only if the calls that it renders can be read back. Any
other would return wrong calls, or prompts that continue with the system prompt.
"""

import pytest

from tests.adapters.templates import find_form, get_calls, make_format, make_template, stream_answer

LOOP = "{% for c in m.tool_calls or [] %}"
NAME, ARGUMENTS = "{{ c.function.name }}", "{{ c.function.arguments | tojson }}"
OBJECT = f'{{"name": "{NAME}", "arguments": {ARGUMENTS}}}'
END = "{% endfor %}"


@pytest.mark.parametrize(
    "calls",
    [
        # The name is a key
        f'{LOOP}<call>[{{"{NAME}": {ARGUMENTS}}}]</call>{END}',
        # Keys that no client knows
        f'{LOOP}<call>{{"act": "{NAME}", "probe_key": 1, "input": {ARGUMENTS}}}</call>{END}',
        # A number behind the name
        f"{LOOP}<call>{NAME}:{{{{ loop.index0 }}}}<args>{ARGUMENTS}</call>{END}",
        # Every call starts with another text
        f"{LOOP}<call>{{{{ c.id }}}}<name>{NAME}<args>{ARGUMENTS}</call>{END}",
    ],
    ids=["name is a key", "other keys", "number", "id first"],
)
def test_a_form_that_cannot_be_read_back_is_none(calls):
    assert find_form(make_template(calls)) is None


def test_a_system_prompt_that_explains_the_tags_is_no_answer():
    before = "Think in [THINK] and [/THINK]. Tools: {{ tools | tojson }}\n"
    template = make_template(f"{LOOP}[RUN]{NAME}[WITH]{ARGUMENTS}{END}", before=before)
    form = make_format(template)
    assert form.calls.get_prefix("set_fan") == "[RUN]set_fan[WITH]"
    answer = stream_answer('[THINK]Hot.[/THINK][RUN]set_fan[WITH]{"level": 2}', form)
    assert (answer.reasoning, get_calls(answer)) == ("Hot.", [("set_fan", {"level": 2})])


def test_a_mark_that_starts_like_that_of_text_is_complete():
    content = (
        "{% if m.tool_calls %}{% elif m.role == 'assistant' %}<text>{{ m.content }}"
        "{% else %}{{ m.content }}{% endif %}"
    )
    template = make_template(f"{LOOP}<tools>[{OBJECT}]</tools>{END}", content=content)
    assert find_form(template).opening == "<tools>"


SECTION = (
    f"{{% if m.tool_calls %}}<|calls|>{LOOP}<|call|>{NAME}<|args|>{ARGUMENTS}<|end_call|>{END}"
    "<|end_calls|>{% endif %}"
)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("before", ["", "I look."])
@pytest.mark.parametrize("between", ["", "\n"])
def test_every_call_of_a_section_is_read(count, before, between):
    calls = [f'<|call|>set_fan<|args|>{{"level": {n}}}<|end_call|>' for n in range(count)]
    text = f"{before}<|calls|>{between.join(calls)}<|end_calls|>"
    answer = stream_answer(text, make_format(make_template(SECTION)))
    assert get_calls(answer) == [("set_fan", {"level": n}) for n in range(count)]
    assert answer.content == before


def test_a_forced_call_opens_its_section():
    form = find_form(make_template(SECTION))
    assert form.get_prefix("set_fan") == "<|calls|><|call|>set_fan<|args|>"


@pytest.mark.parametrize(
    "text",
    [
        '<function=set_fan>{"level": 4, "room": "7"}</function>',
        '<function=set_fan>\n{"level": 4, "room": "7"}\n</function>',
    ],
)
def test_the_json_in_a_function_mark_is_its_arguments(text):
    template = make_template(f"{LOOP}<function={NAME}>{ARGUMENTS}</function>{END}")
    form = make_format(template)
    answer = stream_answer(f"Sure.{text}{text}", form)
    assert get_calls(answer) == [("set_fan", {"level": 4, "room": "7"})] * 2
    assert answer.content == "Sure."
    assert form.calls.get_prefix("set_fan") == "<function=set_fan>"
