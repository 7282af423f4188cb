"""Missing values are missing, and Python literals and Arrow's types are read as what they are."""

import io
import json

import pyarrow
import pyarrow.parquet
import pytest

from tests.datasets.files import detect_and_check, read_staged
from training.datasets.values import parse_nested, remove_nulls, remove_schema_nulls

LAMP = {
    "type": "function",
    "function": {
        "name": "dim",
        "parameters": {
            "type": "object",
            "properties": {
                "level": {"type": "number"},
                "until": {"anyOf": [{"type": "string"}, {"type": "null"}], "default": None},
            },
        },
    },
}


def to_parquet(rows):
    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), out)
    return out.getvalue()


@pytest.mark.parametrize("missing", ["NaN", "Infinity", "-Infinity", "1e999", "null"])
def test_a_number_that_is_none_is_missing(tmp_path, missing):
    rows = [f'{{"instruction": "add {i}", "input": {missing}, "output": "a{i}"}}' for i in range(3)]
    rows.append(f'{{"instruction": "add", "input": "", "output": {missing}}}')
    report = detect_and_check(tmp_path, "\n".join(rows).encode(), "a.jsonl")
    assert report["problems"]["groups"][0]["message"] == "`output` is missing"
    assert [row["messages"][0]["content"] for row in read_staged(tmp_path)] == [
        "add 0",
        "add 1",
        "add 2",
    ]


def test_the_words_nan_and_none_stay_text(tmp_path):
    rows = [
        json.dumps({"prompt": f"p{i}", "completion": word})
        for i, word in enumerate(["NaN", "None"])
    ]
    assert detect_and_check(tmp_path, "\n".join(rows).encode(), "a.jsonl")["rows"] == 2
    assert [row["messages"][1]["content"] for row in read_staged(tmp_path)] == ["NaN", "None"]


def test_nulls_that_arrow_adds_to_tool_calls_are_removed(tmp_path):
    def build(name, arguments):
        call = {"function": {"name": name, "arguments": arguments}}
        tool = {
            "type": "function",
            "function": {
                "name": name,
                "parameters": {"properties": {key: {"type": "string"} for key in arguments}},
            },
        }
        messages = [
            {"role": "user", "content": f"please {name} {arguments}"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
        ]
        return {"messages": messages, "tools": [tool]}

    rows = [build("dim", {"level": "3"}), build("lock", {"door": "back"})]
    detect_and_check(tmp_path, to_parquet(rows), "a.parquet")
    staged = read_staged(tmp_path)
    for row, arguments in zip(staged, ({"level": "3"}, {"door": "back"}), strict=True):
        assert row["messages"][1]["tool_calls"][0]["function"]["arguments"] == arguments
        assert row["tools"][0]["function"]["parameters"]["properties"].keys() == arguments.keys()


def test_a_null_that_the_schema_allows_is_kept():
    parameters = LAMP["function"]["parameters"]
    assert remove_nulls({"level": None, "until": None, "x": [None]}, parameters) == {
        "until": None,
        "x": [None],
    }
    assert remove_schema_nulls({**LAMP, "strict": None}) == LAMP


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        ("[{'role': 'user', 'content': \"it's\"}]", [{"role": "user", "content": "it's"}]),
        ("[{'a': 1}\n {'a': None}]", [{"a": 1}, {"a": None}]),
        ("[array([{'a': nan}], dtype=object)]", [[{"a": None}]]),
        ('[{"a": true}]', [{"a": True}]),
    ],
)
def test_lists_in_a_cell_are_parsed(cell, expected):
    assert parse_nested(cell) == expected


@pytest.mark.parametrize(
    "text",
    ["[sic] a word", "{'a': open('x')}", "['a' * 9]", "[" * 5_000, "[1, 2", "{'a': " * 2_000],
)
def test_other_text_in_brackets_stays_text(text):
    assert parse_nested(text) == text


def test_messages_in_maps_and_in_a_struct_of_lists_are_read(tmp_path):
    turn = pyarrow.map_(pyarrow.string(), pyarrow.string())
    messages = [
        [[("role", "user"), ("content", f"q{i}")], [("role", "assistant"), ("content", f"a{i}")]]
        for i in range(2)
    ]
    out = io.BytesIO()
    table = pyarrow.table({"messages": pyarrow.array(messages, pyarrow.list_(turn))})
    pyarrow.parquet.write_table(table, out)
    assert detect_and_check(tmp_path, out.getvalue(), "a.parquet")["rows"] == 2
    rows = [
        {"messages": {"role": ["user", "assistant"], "content": [f"q{i}", f"a{i}"]}}
        for i in range(3)
    ]
    assert detect_and_check(tmp_path, to_parquet(rows), "a.parquet")["rows"] == 3


def test_a_row_that_is_nested_too_deeply_is_reported(tmp_path):
    deep = '{"prompt": "a", "completion": "b", "x": ' + "[" * 900 + "]" * 900 + "}"
    good = '{"prompt": "c", "completion": "d"}'
    report = detect_and_check(tmp_path, f"{good}\n{deep}\n".encode(), "a.jsonl")
    assert report["rows"] == 1 and report["problems"]["messages"][0].startswith("line 2")
