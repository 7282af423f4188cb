"""Every row format is parsed, and an invalid row is reported with its field and the reason."""

import json

import pytest

from training.datasets.column_mapping import ColumnMapping
from training.datasets.errors import BadRow
from training.datasets.mapping_guess import guess_mapping
from training.datasets.row_builders import to_row

ANSWER = {"role": "assistant", "content": "b"}
MESSAGES = ColumnMapping("messages", {"messages": "messages", "tools": "tools"}, "split")
PAIRS = ColumnMapping("pairs", {"prompt": "prompt", "completion": "completion"}, "split")
SHAREGPT = ColumnMapping("sharegpt", {"conversations": "conversations"})
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"function": {"name": "lamp", "arguments": '{"on": true}'}}],
}


def get_roles(record, mapping):
    return [message["role"] for message in to_row(record, mapping).messages]


@pytest.mark.parametrize(
    ("record", "row_format", "expected_roles"),
    [
        (
            {
                "messages": [
                    {"role": "system", "content": "s"},
                    {"role": "user", "content": "a"},
                    ANSWER,
                ]
            },
            "messages",
            "system user assistant",
        ),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
            "sharegpt",
            "user assistant",
        ),
        ({"instruction": "add", "input": "1 2", "output": "3"}, "alpaca", "user assistant"),
        ({"prompt": "a", "completion": "b"}, "pairs", "user assistant"),
        ({"Frage": "a", "Antwort": "b"}, "pairs", "user assistant"),
        ({"question": "a", "context": "c", "answer": "b"}, "pairs", "user assistant"),
        (
            {"messages": json.dumps([{"role": "user", "content": "a"}, ANSWER])},
            "messages",
            "user assistant",
        ),
        (
            {"dialog": [{"role": "user", "content": "a"}, ANSWER], "id": 3},
            "messages",
            "user assistant",
        ),
    ],
)
def test_the_row_format_is_guessed(record, row_format, expected_roles):
    mapping = guess_mapping([record])
    assert mapping.row_format == row_format
    assert get_roles(record, mapping) == expected_roles.split()


def test_plain_text_is_a_row_format():
    assert to_row({"text": "once"}, guess_mapping([{"text": "once"}])).text == "once"


def test_an_uncertain_guess_is_marked():
    assert not guess_mapping([{"Frage": "a", "Antwort": "b"}]).is_certain
    assert guess_mapping([{"prompt": "a", "completion": "b"}]).is_certain


def test_tool_calls_and_tools_are_kept_with_arguments_as_objects():
    record = {
        "messages": [
            {"role": "user", "content": "a"},
            CALL,
            {"role": "tool", "content": "ok"},
            ANSWER,
        ],
        "tools": [{"name": "lamp"}],
    }
    row = to_row(record, MESSAGES)
    assert row.messages[1]["tool_calls"][0]["function"] == {
        "name": "lamp",
        "arguments": {"on": True},
    }
    assert json.loads(row.to_json())["tools"] == [
        {"type": "function", "function": {"name": "lamp"}}
    ]


def test_text_parts_are_joined_and_role_aliases_are_resolved():
    record = {
        "messages": [
            {"role": "developer", "content": "s"},
            {"role": "user", "content": [{"type": "text", "text": "a"}]},
            ANSWER,
        ]
    }
    assert [m["content"] for m in to_row(record, MESSAGES).messages] == ["s", "a", "b"]


def test_numbers_are_converted_to_text():
    assert to_row({"prompt": "a", "completion": 1}, PAIRS).messages[1]["content"] == "1"


def test_split_aliases_are_resolved():
    assert to_row({"prompt": "a", "completion": "b", "split": "valid"}, PAIRS).split == "eval"


def test_the_system_column_becomes_the_first_message():
    mapping = ColumnMapping(
        "pairs", {"prompt": "prompt", "completion": "completion", "system": "sys"}
    )
    assert get_roles({"prompt": "a", "completion": "b", "sys": "s"}, mapping) == [
        "system",
        "user",
        "assistant",
    ]


@pytest.mark.parametrize(
    ("record", "mapping", "message"),
    [
        ({"text": "a"}, MESSAGES, "`messages` is missing; found `text`"),
        ({}, MESSAGES, "found no fields"),
        ({"messages": []}, MESSAGES, "at least one message"),
        ({"messages": "hi"}, MESSAGES, "`messages` must be a list"),
        ({"messages": [3]}, MESSAGES, "message 1 must be an object"),
        (
            {"messages": [{"role": "robot", "content": "a"}]},
            MESSAGES,
            "message 1: `role` is `robot`; expected system, user, assistant or tool",
        ),
        ({"messages": [{"content": "a"}]}, MESSAGES, "`role` is missing"),
        (
            {"messages": [{"role": "user", "content": None}, ANSWER]},
            MESSAGES,
            "message 1: `content` is missing; expected text",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, ANSWER]},
            MESSAGES,
            "part of type `image_url`",
        ),
        (
            {"messages": [{"role": "user", "content": "a"}]},
            MESSAGES,
            "no assistant message to train on",
        ),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": " "}]},
            MESSAGES,
            "assistant is empty",
        ),
        (
            {"messages": [ANSWER, {"role": "system", "content": "a"}]},
            MESSAGES,
            "`system` message must come first",
        ),
        (
            {"messages": [{"role": "assistant", "content": None, "tool_calls": [{}]}]},
            MESSAGES,
            "no `function.name`",
        ),
        (
            {
                "messages": [
                    {
                        "role": "assistant",
                        "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}],
                    }
                ]
            },
            MESSAGES,
            "are not a JSON object",
        ),
        (
            {"messages": [{"role": "user", "content": "a"}, ANSWER], "tools": "no"},
            MESSAGES,
            "`tools` must be a list",
        ),
        ({"prompt": "a"}, PAIRS, "`completion` is missing; found `prompt`"),
        ({"prompt": "a", "completion": ["b"]}, PAIRS, '`completion` is ["b"]; expected text'),
        ({"prompt": "a", "completion": ""}, PAIRS, "`completion` is empty"),
        (
            {"prompt": "a", "completion": "b", "split": "later"},
            PAIRS,
            "`split` is `later`; expected train, valid or test",
        ),
        ({"prompt": "a\0", "completion": "b"}, PAIRS, "`prompt` holds a NUL character"),
        (
            {"prompt": "a", "completion": "b", "split": ["train"]},
            PAIRS,
            "expected train, valid or test",
        ),
        ({"prompt": "\ud800", "completion": "b"}, PAIRS, "half of a surrogate pair"),
        (
            {"conversations": [{"from": "alien", "value": "x"}]},
            SHAREGPT,
            "message 1: `from` is `alien`",
        ),
        (
            {"conversations": [{"from": "gpt", "value": 3.5}, {"from": "human"}]},
            SHAREGPT,
            "message 2: `value` is missing",
        ),
        ({"conversations": "x"}, SHAREGPT, "`conversations` must be a list"),
    ],
)
def test_an_invalid_row_is_reported_with_its_field(record, mapping, message):
    with pytest.raises(BadRow) as caught:
        to_row(record, mapping)
    assert message in caught.value.message
