"""Exact match: what is exported answers held-out prompts once, and only the expected words
count.
"""

import json

import pytest

from training.engine.data.conversations import encode, load_tokenizer
from training.engine.train import exact_match


def told(folder):
    lines = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "answers"]


@pytest.mark.parametrize("method", ["lora", "prompt", "full"])
def test_it_works(tiny_run, engine_here, method):
    more = {} if method == "lora" else {"rank": 16, "alpha": 32}
    folder = tiny_run(method=method, **more)
    assert engine_here([str(folder)]) == 0
    (last,) = told(folder)
    assert (
        last["rows"] == 4
        and 0 <= last["exact_match"] <= 1
        and last["matches"] == last["exact_match"] * 4
    )
    assert json.loads((folder / "result.json").read_text())["exact_match"] == last["exact_match"]


def test_an_answer_counts_when_it_is_the_expected_one(tiny_run, engine_here, monkeypatch):
    folder = tiny_run()
    first = json.loads((folder / "heldout.jsonl").read_text().splitlines()[0])["messages"][-1][
        "content"
    ]
    monkeypatch.setattr(exact_match, "answer", lambda session, prompt, expected: first)
    assert engine_here([str(folder)]) == 0
    rows = [json.loads(line) for line in (folder / "heldout.jsonl").read_text().splitlines()]
    right = sum(row["messages"][-1]["content"] == first for row in rows)
    assert told(folder)[0]["matches"] == right > 0


def test_it_can_be_switched_off(tiny_run, engine_here):
    folder = tiny_run(exact_match_rows=0)
    assert engine_here([str(folder)]) == 0
    assert not told(folder)


def test_of_several_turns_the_last_is_asked(tiny_model):
    tokenizer = load_tokenizer(tiny_model)
    row = {
        "messages": [
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "first"},
            {"role": "user", "content": "and"},
            {"role": "assistant", "content": "second"},
        ]
    }
    found = exact_match.last_answer(encode(tokenizer, row, max_length=200))
    assert "second" in tokenizer.decode(found) and "first" not in tokenizer.decode(found)
