"""Tool calls in any form are read completely, or what is left out is listed."""

import json

import pytest

from training.datasets.rows import build_row

ASK = {"role": "user", "content": "light"}


def read_call(call, **keys):
    row = build_row([ASK, {"role": "assistant", "content": None, **keys, "tool_calls": [call]}])
    return row.messages[1]["tool_calls"][0], row.unused


@pytest.mark.parametrize(
    "call",
    [
        {"function": {"name": "lamp", "arguments": {"on": True}}},
        {"function": {"name": "lamp"}, "arguments": {"on": True}},
        {"name": "lamp", "parameters": {"on": True}},
        {"function": {"name": "lamp", "arguments": '{"on": true}'}},
        json.dumps({"function": {"name": "lamp", "arguments": {"on": True}}}),
    ],
    ids=str,
)
def test_arguments_are_found_beside_the_function_or_in_it(call):
    stored, unused = read_call(call)
    assert stored["function"] == {"name": "lamp", "arguments": {"on": True}} and not unused


@pytest.mark.parametrize("arguments", [None, "", "null", "{}", {}, []])
def test_a_call_may_have_no_arguments(arguments):
    stored, _ = read_call({"function": {"name": "lamp", "arguments": arguments}})
    assert stored["function"]["arguments"] == {}


@pytest.mark.parametrize("as_text", [False, True])
def test_other_keys_of_a_call_are_listed(as_text):
    function = {"name": "lamp", "arguments": {"on": True}, "parameters": {"y": 2}}
    calls = [{"function": function, "thought_signature": "abc"}]
    message = {"role": "assistant", "tool_calls": json.dumps(calls) if as_text else calls}
    assert build_row([ASK, message]).unused == {
        "messages[].tool_calls[].thought_signature",
        "messages[].tool_calls[].parameters",
    }


def test_a_call_turn_of_sharegpt_in_capitals_is_read_and_its_other_calls_are_listed():
    turn = {"from": "Function_Call", "value": '{"name": "lamp"}', "tool_calls": [{"name": "x"}]}
    row = build_row([{"from": "human", "value": "light"}, turn])
    assert row.messages[1]["tool_calls"][0]["function"]["name"] == "lamp"
    assert row.unused == {"messages[].tool_calls"}


def test_an_older_function_call_may_be_json_in_a_text():
    call = json.dumps({"name": "lamp", "arguments": "{}"})
    row = build_row([ASK, {"role": "assistant", "content": None, "function_call": call}])
    assert row.messages[1]["tool_calls"][0]["function"]["name"] == "lamp"


def test_ids_that_are_numbers_link_a_call_and_its_result():
    call = {"id": 7, "function": {"name": "lamp"}}
    result = {"role": "tool", "tool_call_id": 7, "name": 5, "content": "ok"}
    row = build_row([ASK, {"role": "assistant", "tool_calls": [call]}, result])
    assert row.messages[1]["tool_calls"][0]["id"] == row.messages[2]["tool_call_id"] == "7"
    assert row.messages[2]["name"] == "5" and not row.unused
