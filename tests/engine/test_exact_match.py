"""Exact match: the exported weights answer held-out prompts, and only identical answers count."""

import json

import pytest

from training.engine.data.conversations import encode_row, load_tokenizer
from training.engine.train import exact_match


def read_answers(folder):
    lines = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "exact_match"]


@pytest.mark.parametrize("method", ["lora", "prompt", "full"])
def test_a_finished_run_reports_its_exact_match(tiny_run, engine_here, method):
    lora_settings = {} if method == "lora" else {"rank": 16, "alpha": 32}
    folder = tiny_run(method=method, **lora_settings)
    assert engine_here([str(folder)]) == 0
    (answers_event,) = read_answers(folder)
    assert (
        answers_event["rows"] == 4
        and 0 <= answers_event["exact_match"] <= 1
        and answers_event["matches"] == answers_event["exact_match"] * 4
    )
    assert (
        json.loads((folder / "result.json").read_text())["exact_match"]
        == answers_event["exact_match"]
    )


def test_an_answer_counts_only_if_it_equals_the_expected_one(tiny_run, engine_here, monkeypatch):
    folder = tiny_run()
    first = json.loads((folder / "eval.jsonl").read_text().splitlines()[0])["messages"][-1][
        "content"
    ]
    monkeypatch.setattr(exact_match, "generate_answer", lambda session, prompt, expected: first)
    assert engine_here([str(folder)]) == 0
    rows = [json.loads(line) for line in (folder / "eval.jsonl").read_text().splitlines()]
    matches = sum(row["messages"][-1]["content"] == first for row in rows)
    assert read_answers(folder)[0]["matches"] == matches > 0


def test_it_can_be_switched_off(tiny_run, engine_here):
    folder = tiny_run(exact_match_rows=0)
    assert engine_here([str(folder)]) == 0
    assert not read_answers(folder)


def test_the_last_of_several_turns_is_the_expected_answer(tiny_model):
    tokenizer = load_tokenizer(tiny_model)
    row = {
        "messages": [
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "first"},
            {"role": "user", "content": "and"},
            {"role": "assistant", "content": "second"},
        ]
    }
    answer_ids = exact_match.find_last_answer(encode_row(tokenizer, row, max_length=200))
    assert "second" in tokenizer.decode(answer_ids) and "first" not in tokenizer.decode(answer_ids)
