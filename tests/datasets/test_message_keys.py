"""Keys of messages keep their meaning: masks, reasoning, names, ids and older function calls."""

import json

import pytest

from training.datasets.column_mapping import ColumnMapping
from training.datasets.errors import BadRow
from training.datasets.mapping_guess import guess_mapping
from training.datasets.row_builders import to_row

MESSAGES = ColumnMapping("messages", {"messages": "messages", "tools": "tools"})
QUESTION = {"role": "user", "content": "how warm is it?"}
ANSWER = {"role": "assistant", "content": "21 degrees"}


def build(*messages, **columns):
    return to_row({"messages": [QUESTION, *messages], **columns}, MESSAGES)


@pytest.mark.parametrize(
    "mask",
    [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"training": "false"}, {"loss": False}],
)
def test_a_masked_answer_is_kept_as_context(mask):
    row = build({**ANSWER, **mask}, QUESTION, ANSWER)
    assert [message.get("weight", 1) for message in row.messages] == [1, 0, 1, 1]
    assert not row.unused


def test_a_mask_of_one_leaves_the_answer_trained():
    assert "weight" not in build({**ANSWER, "weight": 1, "train": True}).messages[1]


def test_a_weight_between_zero_and_one_is_reported():
    with pytest.raises(BadRow, match=r"message 2: `weight` is 0\.5"):
        build({**ANSWER, "weight": 0.5})


def test_a_row_whose_answers_are_all_masked_is_reported():
    with pytest.raises(BadRow, match="every assistant message"):
        build({**ANSWER, "train": False})


def test_a_wish_to_train_a_user_message_is_listed_as_unused():
    row = to_row({"messages": [{**QUESTION, "train": True}, ANSWER]}, MESSAGES)
    assert row.unused == {"messages[].train"}
    assert not to_row({"messages": [{**QUESTION, "train": False}, ANSWER]}, MESSAGES).unused


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_is_kept_under_one_name(key):
    row = build({**ANSWER, key: "The sensor says so."})
    assert row.messages[1]["reasoning_content"] == "The sensor says so."
    assert not row.unused


def test_reasoning_in_a_content_part_is_kept():
    parts = [{"type": "thinking", "thinking": "Sensor."}, {"type": "text", "text": "21 degrees"}]
    message = build({"role": "assistant", "content": parts}).messages[1]
    assert message == {**ANSWER, "reasoning_content": "Sensor."}


def test_two_different_reasonings_are_not_dropped_silently():
    row = build({**ANSWER, "thinking": "a", "reasoning": "b"})
    assert row.messages[1]["reasoning_content"] == "a"
    assert row.unused == {"messages[].reasoning"}


def test_ids_and_names_of_tools_are_kept():
    call = {"id": "call_9", "function": {"name": "read", "arguments": "{}"}}
    result = {"role": "tool", "tool_call_id": "call_9", "name": "read", "content": "21"}
    row = build({"role": "assistant", "content": None, "tool_calls": [call]}, result, ANSWER)
    assert row.messages[1]["tool_calls"][0]["id"] == "call_9"
    assert row.messages[2] == result


@pytest.mark.parametrize("content", [None, "I look."])
def test_an_older_function_call_becomes_a_tool_call(content):
    record = {
        "messages": [
            QUESTION,
            {
                "role": "assistant",
                "content": content,
                "function_call": {"name": "read", "arguments": '{"room": "hall"}'},
            },
            {"role": "function", "name": "read", "content": "21"},
            ANSWER,
        ],
        "functions": [{"name": "read", "parameters": {"type": "object"}}],
    }
    row = to_row(record, guess_mapping([record]))
    assert row.messages[1]["tool_calls"][0]["function"]["arguments"] == {"room": "hall"}
    assert row.messages[1]["content"] == (content or "")
    assert row.tools[0]["function"]["name"] == "read"
    assert not row.unused


def test_a_sharegpt_turn_with_several_calls_is_one_message():
    calls = [{"name": "read", "arguments": {"room": room}} for room in ("hall", "attic")]
    record = {
        "conversations": [
            {"from": "Human", "value": "how warm is it?"},
            {"from": "function_call", "value": json.dumps(calls)},
            {"from": "observation", "value": "21 and 30"},
            {"from": "gpt", "value": "warm", "weight": 1},
        ]
    }
    row = to_row(record, guess_mapping([record]))
    assert [c["function"]["arguments"]["room"] for c in row.messages[1]["tool_calls"]] == [
        "hall",
        "attic",
    ]


@pytest.mark.parametrize(
    "turns",
    [
        [{"role": "Human", "text": "hi"}, {"role": "AI", "text": "ho"}],
        [{"from": "USER", "content": "hi"}, {"from": "Bot", "content": "ho"}],
    ],
)
def test_other_spellings_of_keys_and_roles_are_read(turns):
    record = {"dialog": turns}
    row = to_row(record, guess_mapping([record]))
    assert [m["role"] for m in row.messages] == ["user", "assistant"]
    assert [m["content"] for m in row.messages] == ["hi", "ho"]


def test_questions_with_their_answers_are_one_conversation():
    exchanges = [{"system": "s", "input": "q1", "output": "a1"}, {"input": "q2", "output": "a2"}]
    record = {"conversation": exchanges}
    row = to_row(record, guess_mapping([record]))
    assert [message["content"] for message in row.messages] == ["s", "q1", "a1", "q2", "a2"]


def test_a_key_that_occurs_twice_in_a_cell_is_reported():
    record = {"messages": '[{"role": "user", "role": "assistant", "content": "a"}]'}
    with pytest.raises(BadRow, match="duplicate key"):
        to_row(record, MESSAGES)


def test_an_unknown_key_is_listed_and_an_empty_one_is_not():
    row = build({**ANSWER, "mood": "calm", "refusal": None, "annotations": []})
    assert row.unused == {"messages[].mood"}


def test_a_text_part_without_text_is_reported():
    with pytest.raises(BadRow, match="message 2: `text` is missing"):
        build({"role": "assistant", "content": [{"type": "text", "text": None}]})
