"""Reasoning, text and calls of gpt-oss are in channels, whose marks are none of their text."""

import pytest

from tests import tiny
from tests.adapters.templates import get_calls, make_format, stream_answer

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% if m.thinking %}"
    "<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>{% endif %}"
    "{% for c in m.tool_calls or [] %}<|start|>assistant to=functions.{{ c.function.name }}"
    "<|channel|>commentary json<|message|>{{ c.function.arguments | tojson }}<|call|>{% else %}"
    "<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|end|>{% endfor %}"
    "{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
THOUGHT = "<|channel|>analysis<|message|>It is warm.<|end|><|start|>assistant"
CALL = '<|channel|>commentary to=functions.set_fan <|constrain|>json<|message|>{"level": 5}'


@pytest.mark.parametrize(
    ("text", "reasoning", "content", "calls"),
    [
        (f"{THOUGHT}<|channel|>final<|message|>Yes, it is.", "It is warm.", "Yes, it is.", []),
        ("<|channel|>final<|message|>Yes, it is.", "", "Yes, it is.", []),
        (f"{THOUGHT}{CALL}", "It is warm.", "", [("set_fan", {"level": 5})]),
        (CALL, "", "", [("set_fan", {"level": 5})]),
        (
            f"{THOUGHT}<|channel|>commentary<|message|>I cool it.<|end|><|start|>assistant{CALL}",
            "It is warm.",
            "I cool it.",
            [("set_fan", {"level": 5})],
        ),
        ("<|channel|>analysis<|message|>It is", "It is", "", []),
    ],
)
def test_each_channel_is_a_field_of_the_message(text, reasoning, content, calls):
    answer = stream_answer(text, make_format(TEMPLATE))
    assert (answer.reasoning, answer.content) == (reasoning, content)
    assert get_calls(answer) == calls


def test_the_tags_are_kept_although_they_are_special_tokens():
    tags = "".join(make_format(TEMPLATE).tags)
    assert all(tag in tags for tag in ("<|start|>", "<|channel|>", "<|message|>", "<|end|>"))
    assert "<|start|>" not in "".join(make_format(tiny.TEMPLATE).tags)
