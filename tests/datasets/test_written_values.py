"""Numbers, indices and booleans are trained as the file has them."""

import io
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from tests.datasets.files import detect_and_check, read_staged
from training.datasets.errors import BadRow
from training.datasets.mapping_guess import guess_mapping
from training.datasets.row_builders import to_row

CHOICES = ["4", "0", "2", "6"]


def write_parquet(**columns):
    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), out)
    return out.getvalue()


def read_answers(folder, content, name):
    detect_and_check(folder, content, name)
    return [row["messages"][-1]["content"] for row in read_staged(folder)]


def test_numbers_of_json_keep_their_digits(tmp_path):
    numbers = ["1.10", "1e16", "0.30000000000000004", "7", "true"]
    lines = [
        f'{{"prompt": "number {index}", "completion": {number}}}'
        for index, number in enumerate(numbers)
    ]
    assert read_answers(tmp_path, "\n".join(lines).encode(), "a.jsonl") == numbers


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_floats_of_parquet_keep_their_digits(tmp_path, kind):
    values = pyarrow.array(np.array([0.1, 2.5], kind))
    content = write_parquet(prompt=["a", "b"], completion=values)
    assert read_answers(tmp_path, content, "a.parquet") == ["0.1", "2.5"]


def test_floats_in_lists_and_objects_of_parquet_keep_their_digits(tmp_path):
    arguments = pyarrow.struct([("level", pyarrow.float32()), ("room", pyarrow.string())])
    function = pyarrow.struct([("name", pyarrow.string()), ("arguments", arguments)])
    message = pyarrow.struct(
        [
            ("role", pyarrow.string()),
            ("content", pyarrow.string()),
            ("tool_calls", pyarrow.list_(pyarrow.struct([("function", function)]))),
        ]
    )
    call = {"function": {"name": "lamp", "arguments": {"level": 0.1, "room": None}}}
    rows = [
        [
            {"role": "user", "content": "light"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "assistant", "content": "done", "tool_calls": None},
        ],
        [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}],
    ]
    content = write_parquet(messages=pyarrow.array(rows, pyarrow.list_(message)))
    detect_and_check(tmp_path, content, "a.parquet")
    first, second = (row["messages"] for row in read_staged(tmp_path))
    assert first[1]["tool_calls"][0]["function"]["arguments"] == {"level": 0.1}
    assert [message["content"] for message in second] == ["hi", "ho"]


def test_floats_in_maps_and_fixed_lists_of_parquet_keep_their_digits(tmp_path):
    choices = pyarrow.array([[0.1, 0.2], None], pyarrow.list_(pyarrow.float32(), 2))
    extra = pyarrow.array([[("a", 0.1)], None], pyarrow.map_(pyarrow.string(), pyarrow.float32()))
    content = write_parquet(question=["q?", "r?"], choices=choices, answer=["A", "B"], extra=extra)
    detect_and_check(tmp_path, content, "a.parquet")
    assert "A. 0.1\nB. 0.2" in next(iter(read_staged(tmp_path)))["messages"][0]["content"]


def read_choice(answer, choices=tuple(CHOICES)):
    record = {"question": "the degree?", "choices": list(choices), "answer": answer}
    return to_row(record, guess_mapping([record])).messages[-1]["content"]


@pytest.mark.parametrize(("index", "label"), [(0, "A"), (2, "C"), (3.0, "D")])
def test_a_number_is_the_index_of_a_choice_even_if_choices_are_numbers(index, label):
    assert read_choice(index) == label


@pytest.mark.parametrize(
    ("answer", "trained"), [("4", "4"), ("3", "D"), ("6", "6"), ("B", "B"), ("none", "none")]
)
def test_a_text_is_an_index_only_if_it_is_no_choice(answer, trained):
    assert read_choice(answer) == trained


def test_a_text_that_is_an_index_and_another_choice_is_a_problem():
    with pytest.raises(BadRow) as bad:
        read_choice("0")
    assert "index" in bad.value.group
    assert read_choice("0", ["0", "1"]) == "0"


def test_messages_in_a_cell_beside_a_text_are_messages(tmp_path):
    text = "prompt,completion\n\"[{'role': 'user', 'content': 'name a river'}]\",Rhine\n"
    detect_and_check(tmp_path, text.encode(), "a.csv")
    (row,) = read_staged(tmp_path)
    assert [message["content"] for message in row["messages"]] == ["name a river", "Rhine"]


def test_an_answer_that_is_json_of_messages_stays_text(tmp_path):
    answer = json.dumps([{"role": "user", "content": "hi"}])
    line = json.dumps({"prompt": "write a message", "completion": answer})
    assert read_answers(tmp_path, line.encode(), "a.jsonl") == [answer]
