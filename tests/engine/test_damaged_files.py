"""Damaged files in a run's folder: the engine repairs them or ends the run with a cause."""

import json

import pytest

from tests import tiny
from tests.user_errors import assert_mentions
from training.engine.events import BrokenJournal, Journal, read_events
from training.engine.outcome import EXIT_CODES, Outcome, Result, read_result

FAULT = EXIT_CODES[Outcome.FAULT]
NO_EVENTS = [
    b"\0" * 40,
    b"\xff",
    b"{}",
    b"[1]",
    b"5",
    b'{"seq": "1", "kind": "log", "time": 1}',
    b'{"seq": 1, "kind": "log"}',
    b"[" * 9_000,
]


@pytest.mark.parametrize("line", NO_EVENTS)
def test_a_line_that_is_no_event_is_a_broken_journal(tmp_path, line):
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"seq": 1, "time": 1, "kind": "log"}\n' + line + b"\n")
    with pytest.raises(BrokenJournal, match="damaged"):
        list(read_events(path))
    with pytest.raises(BrokenJournal, match="damaged"):
        Journal(tmp_path)


def test_an_engine_with_a_broken_journal_ends_at_once_with_the_cause(tiny_run, engine_here):
    folder = tiny_run()
    (folder / "events.jsonl").write_bytes(b"\0\0\0\n")
    assert engine_here([str(folder)]) == FAULT
    assert_mentions(read_result(folder).message, "journal", "damaged")
    assert (folder / "events.jsonl").read_bytes() == b"\0\0\0\n"


@pytest.mark.parametrize("text", ["", "x", "\0\0"])
def test_a_damaged_count_of_starts_counts_as_one(tiny_run, engine_here, text):
    folder = tiny_run()
    (folder / "attempts").write_text(text)
    assert engine_here([str(folder)]) == 0
    assert (folder / "attempts").read_text() == "2"
    assert any(event["kind"] == "resume" for event in tiny.read_events(folder))


@pytest.mark.parametrize("text", ["", "{", "null", "[]", "{}", '{"outcome": "won"}', "\0"])
def test_a_damaged_result_is_no_result(tmp_path, text):
    (tmp_path / "result.json").write_text(text)
    assert read_result(tmp_path) is None


def test_a_result_may_have_fields_of_another_version(tmp_path):
    values = {"outcome": "finished", "step": 4, "medal": "gold"}
    (tmp_path / "result.json").write_text(json.dumps(values))
    assert read_result(tmp_path) == Result(outcome=Outcome.FINISHED, step=4)
