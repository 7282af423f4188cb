import json

import pytest

from training.engine.events import EVENT_KINDS, Journal, read_events


def test_events_are_numbered_from_one_and_read_back(tmp_path):
    journal = Journal(tmp_path)
    journal.write_event("phase", name="loading")
    journal.write_event("log", level="info", text="two\nlines")
    read = [event for event, _ in read_events(journal.path)]
    assert [event["seq"] for event in read] == [1, 2]
    assert read[1]["text"] == "two\nlines"


def test_an_undeclared_kind_or_field_is_rejected(tmp_path):
    journal = Journal(tmp_path)
    with pytest.raises(ValueError, match="not declared"):
        journal.write_event("gossip", text="x")
    with pytest.raises(ValueError, match="not declared"):
        journal.write_event("log", txt="x")
    assert journal.seq == 0


def test_an_incomplete_last_line_is_removed_and_its_number_reused(tmp_path):
    journal = Journal(tmp_path)
    for name in ("a", "b"):
        journal.write_event("phase", name=name)
    journal.close()
    valid_bytes = journal.path.read_bytes()
    journal.path.write_bytes(valid_bytes + b'{"seq": 3, "ti')
    reopened = Journal(tmp_path)
    assert reopened.seq == 2
    assert journal.path.read_bytes() == valid_bytes
    assert reopened.write_event("phase", name="c") == 3


def test_a_journal_with_only_an_incomplete_line_starts_from_one(tmp_path):
    (tmp_path / "events.jsonl").write_bytes(b'{"seq": 1')
    assert Journal(tmp_path).write_event("phase", name="a") == 1


def test_a_last_line_longer_than_the_read_window_is_recovered(tmp_path):
    journal = Journal(tmp_path)
    journal.write_event("phase", name="a")
    journal.write_event("log", level="info", text="x" * 200_000)
    journal.close()
    assert Journal(tmp_path).seq == 2


def test_a_reader_gets_only_complete_lines_and_continues_at_its_offset(tmp_path):
    journal = Journal(tmp_path)
    journal.write_event("phase", name="a")
    with journal.path.open("ab") as file:
        file.write(b'{"seq": 2, "time": 1, "kind": "phase"')
    read = list(read_events(journal.path))
    assert [event["seq"] for event, _ in read] == [1]
    with journal.path.open("ab") as file:
        file.write(b"}\n")
    assert [event["seq"] for event, _ in read_events(journal.path, read[-1][1])] == [2]


def test_non_finite_floats_are_written_as_text(tmp_path):
    journal = Journal(tmp_path)
    journal.write_event("eval", step=1, eval_loss=float("nan"), perplexity=float("inf"))
    event = json.loads(journal.path.read_text())
    assert (event["eval_loss"], event["perplexity"]) == ("nan", "inf")


def test_every_kind_has_a_description_and_fields():
    assert all(kind.description and kind.field_names for kind in EVENT_KINDS.values())
