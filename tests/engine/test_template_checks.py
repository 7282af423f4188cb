"""A chat template that drops a part of a row is an error, since the model would learn an answer to
something else.
"""

import pytest

from tests import tiny
from tests.user_errors import raises_user_error
from training.engine.data.conversations import encode_row
from training.engine.data.errors import DataError

HEAD = "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
CONTENT = "{{ message['content'] or '' }}"
CALLS = "{% for call in message.get('tool_calls', []) %}{{ call['function'] | tojson }}{% endfor %}"
CALL_NAMES = CALLS.replace("['function'] | tojson", "['function']['name']")
TAIL = "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
TOOLS = "{% if tools %}{{ tools | tojson }}\n{% endif %}"
COMPLETE = TOOLS + HEAD + CONTENT + CALLS + TAIL


def make_call(name, **arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


ROW = {
    "tools": [{"type": "function", "function": {"name": "lamp", "parameters": {}}}],
    "messages": [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "light the lamp, be kind, ok"},
        {
            "role": "assistant",
            "content": "ok",
            "tool_calls": [make_call("lamp", on=True), make_call("lamp", on=False)],
        },
        {"role": "tool", "content": "ok"},
        {"role": "assistant", "content": "ok"},
    ],
}


def encode(template, row=ROW, **options):
    return encode_row(tiny.make_tokenizer(template), row, max_length=999, **options)


@pytest.mark.parametrize("train_on_prompt", [False, True])
def test_a_template_that_renders_everything_is_accepted(train_on_prompt):
    assert encode(COMPLETE, train_on_prompt=train_on_prompt).trained_tokens


@pytest.mark.parametrize(
    "template",
    [
        HEAD + CONTENT + CALLS + TAIL,
        TOOLS + HEAD + CONTENT + TAIL,
        TOOLS + HEAD + CONTENT + CALL_NAMES + TAIL,
        TOOLS + HEAD + CONTENT + CALLS.replace("[])", "[])[:1]") + TAIL,
    ],
    ids=["tools", "calls", "arguments", "second call"],
)
@pytest.mark.parametrize("train_on_prompt", [False, True])
def test_dropped_tools_calls_and_arguments_are_an_error(template, train_on_prompt):
    with raises_user_error(DataError, code="template_without_tools"):
        encode(template, train_on_prompt=train_on_prompt)


@pytest.mark.parametrize(
    ("condition", "number", "role"),
    [
        ("message['role'] != 'system'", 1, "system"),
        ("message['role'] != 'tool'", 4, "tool"),
        ("not message.get('tool_calls')", 3, "assistant"),
    ],
)
def test_a_dropped_message_is_an_error_even_if_its_words_occur_elsewhere(condition, number, role):
    content = f"{{% if {condition} %}}{CONTENT}{{% endif %}}"
    with raises_user_error(DataError, code="template_drops_message", naming=(number, role)):
        encode(TOOLS + HEAD + content + CALLS + TAIL)


def test_a_changed_spelling_of_a_content_is_no_error():
    assert encode(COMPLETE.replace("message['content'] or ''", "message['content'] | tojson"))


CUT = HEAD + "{{ message['content'].split('</think>')[-1] }}" + TAIL


def make_thinking_row(**keys):
    return {
        "messages": [
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "<think>hm</think>ho", **keys},
            {"role": "user", "content": "hi again"},
            {"role": "assistant", "content": "ho"},
        ]
    }


def test_a_template_may_cut_the_reasoning_of_an_answer_that_is_not_trained():
    assert encode(CUT, make_thinking_row(weight=0)).trained_tokens


def test_a_trained_answer_whose_reasoning_is_cut_is_an_error():
    with raises_user_error(DataError, code="template_drops_message", naming=("2", "assistant")):
        encode(CUT, make_thinking_row())


def test_with_the_prompt_only_the_last_answer_has_to_be_complete():
    assert encode(CUT, make_thinking_row(), train_on_prompt=True).trained_tokens
    row = {"messages": make_thinking_row()["messages"][:2]}
    with raises_user_error(DataError, code="template_drops_message"):
        encode(CUT, row, train_on_prompt=True)


@pytest.mark.parametrize("train_on_prompt", [False, True])
@pytest.mark.parametrize("keys", [{}, {"weight": 0}])
def test_reasoning_without_a_place_in_the_template_is_an_error(train_on_prompt, keys):
    row = make_thinking_row(reasoning_content="hm", **keys)
    with raises_user_error(DataError, code="template_without_reasoning", naming=("2",)):
        encode(COMPLETE, row, train_on_prompt=train_on_prompt)
