"""Journal events are stored exactly once, and steps that are repeated after a resume are
superseded.
"""

import json

import pytest

from tests.runs.journals import Journal, step_event
from training.engine.events import BrokenJournal
from training.runs.launch.yaml_file import to_yaml
from training.runs.live.messages import build_snapshot, event_to_json, read_events_after
from training.runs.metrics.chunks import CHUNK_SIZE
from training.runs.models import CurveChunk, Event, Run
from training.runs.worker.ingest import store_events
from training.runs.worker.lease import LeaseLost, claim_run

pytestmark = pytest.mark.django_db


@pytest.fixture
def journal():
    return Journal()


@pytest.fixture
def leased_run(run):
    lease = claim_run(run.pk)
    return lease, Run.objects.get(pk=run.pk)


def test_events_become_rows_and_update_the_run(leased_run, journal):
    lease, run = leased_run
    store_events(
        lease,
        run,
        journal.lines(
            {"kind": "phase", "name": "tokenizing", "done": 5, "total": 9}, step_event(1, 2.5)
        ),
        77,
    )
    stored = Run.objects.get(pk=run.pk)
    assert (stored.last_seq, stored.journal_offset, stored.step, stored.loss) == (2, 77, 1, 2.5)
    assert (run.last_seq, run.step) == (2, 1)
    assert stored.peak_memory_bytes == 2001
    assert [event.kind for event in Event.objects.filter(run=run)] == ["phase", "step"]


def test_rows_that_the_engine_left_out_go_into_the_config(leased_run, journal):
    lease, run = leased_run
    start = {"kind": "start", "total_steps": 9, "excluded_rows": "3, 17-20"}
    store_events(lease, run, journal.lines(start), 10)
    stored = Run.objects.get(pk=run.pk)
    assert stored.config == run.config and stored.config["excluded_rows"] == "3, 17-20"
    assert "excluded_rows: 3, 17-20" in to_yaml(stored)


@pytest.mark.parametrize("kind", ["sample", "saving", "log", "end"])
def test_events_that_do_not_change_the_run_are_also_stored_once(leased_run, journal, kind):
    lease, run = leased_run
    for _ in range(3):
        store_events(lease, run, journal.lines({"kind": kind, "step": 1}), 10)
    assert Event.objects.filter(run=run, kind=kind).count() == run.last_seq == 3


def test_a_missing_or_repeated_event_number_stores_nothing(leased_run, journal):
    lease, run = leased_run
    lines = journal.lines(step_event(1), step_event(2))
    store_events(lease, run, lines[:1], 10)
    for wrong in (lines[:1], journal.lines(step_event(3))):
        with pytest.raises(BrokenJournal):
            store_events(lease, run, wrong, 20)
    assert Event.objects.filter(run=run).count() == 1
    store_events(lease, run, lines[1:], 20)
    assert Run.objects.get(pk=run.pk).last_seq == 2


@pytest.mark.parametrize(
    "change",
    [{"loss": None}, {"loss": "x"}, {"seconds": []}, {"step": 2**80}, {"step": {}}],
    ids=str,
)
def test_an_event_with_a_wrong_field_is_a_broken_journal_and_stores_nothing(
    leased_run, journal, change
):
    lease, run = leased_run
    lines = journal.lines(step_event(1), step_event(2))
    with pytest.raises(BrokenJournal, match="damaged"):
        store_events(lease, run, [lines[0], lines[1] | change], 20)
    assert Event.objects.filter(run=run).count() == run.last_seq == 0
    store_events(lease, run, lines, 20)


def test_a_worker_without_the_lease_stores_nothing(leased_run, journal):
    lease, run = leased_run
    Run.objects.filter(pk=run.pk).update(lease_token="another")
    with pytest.raises(LeaseLost):
        store_events(lease, run, journal.lines(step_event(1)), 10)
    assert Event.objects.filter(run=run).count() == 0
    assert run.last_seq == 0


def test_steps_move_into_chunks_and_are_read_back_unchanged(leased_run, journal):
    lease, run = leased_run
    lines = journal.lines(*[step_event(n, 1 / n) for n in range(1, 2 * CHUNK_SIZE + 100)])
    for at in range(0, len(lines), 200):
        store_events(lease, run, lines[at : at + 200], at)
    assert CurveChunk.objects.filter(run=run).count() == 2
    assert Event.objects.filter(run=run).count() == 99
    back = [event_to_json(event) for event in read_events_after(run.pk, 0, 5000)]
    assert back == lines


def test_values_that_are_not_finite_are_stored_and_give_valid_json(leased_run, journal):
    lease, run = leased_run
    store_events(
        lease,
        run,
        journal.lines(
            step_event(1, "nan"),
            {"kind": "eval", "step": 1, "eval_loss": "inf", "perplexity": "inf"},
        ),
        1,
    )
    store_events(lease, run, journal.lines(*[step_event(n) for n in range(2, CHUNK_SIZE + 2)]), 2)
    assert Run.objects.get(pk=run.pk).eval_loss is None
    assert event_to_json(read_events_after(run.pk, 0, 1)[0])["loss"] == "nan"
    json.dumps(build_snapshot(run.pk, 100), allow_nan=False)


def test_a_nul_character_of_a_model_can_be_stored(leased_run, journal):
    lease, run = leased_run
    store_events(
        lease,
        run,
        journal.lines(
            {"kind": "sample", "step": 1, "prompt": "a\0", "expected": "b", "answer": "c"}
        ),
        1,
    )
    assert Event.objects.get(run=run).fields["prompt"] == "a\ufffd"


def test_a_resume_supersedes_the_steps_that_are_repeated(leased_run, journal):
    lease, run = leased_run
    lines = journal.lines(
        *[step_event(n) for n in range(1, 701)], {"kind": "eval", "step": 700, "eval_loss": 1.0}
    )
    store_events(lease, run, lines, 1)
    store_events(
        lease,
        run,
        journal.lines(
            {"kind": "resume", "attempt": 2, "step": 500}, *[step_event(n) for n in range(501, 901)]
        ),
        2,
    )
    picture = build_snapshot(run.pk, 2000)
    assert picture["curves"]["points"] == 900
    assert not [event for event in picture["events"] if event["kind"] == "eval"]
    assert Run.objects.get(pk=run.pk).step == 900
    everything = read_events_after(run.pk, 0, 10_000)
    assert [event.seq for event in everything] == list(range(1, journal.seq + 1))
    assert [
        event.step for event in everything if event.superseded and event.kind == "step"
    ] == list(range(501, 701))


def test_a_resume_from_the_beginning_supersedes_the_first_evaluation(leased_run, journal):
    lease, run = leased_run
    store_events(
        lease, run, journal.lines({"kind": "eval", "step": 0, "eval_loss": 1.0}, step_event(1)), 1
    )
    again = (
        {"kind": "resume", "attempt": 2, "step": 0},
        {"kind": "eval", "step": 0, "eval_loss": 1.0},
    )
    store_events(lease, run, journal.lines(*again), 2)
    assert (
        len([event for event in build_snapshot(run.pk, 100)["events"] if event["kind"] == "eval"])
        == 1
    )


@pytest.mark.parametrize("limit", [100, 700, 2000])
def test_after_many_resumes_a_reader_gets_every_event_once(leased_run, journal, limit):
    lease, run = leased_run
    at = 0
    for attempt in range(2, 12):
        store_events(
            lease, run, journal.lines(*[step_event(n) for n in range(at + 1, at + 151)]), attempt
        )
        store_events(
            lease,
            run,
            journal.lines({"kind": "resume", "attempt": attempt, "step": at + 70}),
            attempt,
        )
        at += 70
    cursor, seen = 0, []
    while batch := read_events_after(run.pk, cursor, limit):
        seen += [event.seq for event in batch]
        cursor = seen[-1]
    assert CurveChunk.objects.filter(run=run, superseded=True).exists()
    assert seen == list(range(1, journal.seq + 1))


def test_the_sparkline_stays_short(leased_run, journal):
    lease, run = leased_run
    store_events(lease, run, journal.lines(*[step_event(n) for n in range(1, 501)]), 1)
    assert 30 <= len(Run.objects.get(pk=run.pk).sparkline) <= 60


def test_a_resume_restores_the_best_eval_loss(leased_run, journal):
    lease, run = leased_run

    def measured(n, loss):
        return {
            "kind": "eval",
            "step": n,
            "eval_loss": loss,
            "perplexity": 1.0,
            "rows": 1,
            "total_tokens": n,
            "seconds": 0.1,
            "best": True,
        }

    store_events(
        lease,
        run,
        journal.lines(
            measured(0, 3.0),
            step_event(1),
            step_event(2),
            measured(2, 2.0),
            step_event(3),
            measured(3, 1.0),
        ),
        1,
    )
    assert (run.best_eval_loss, run.best_step) == (1.0, 3)
    store_events(lease, run, journal.lines({"kind": "resume", "step": 2, "attempt": 2}), 2)
    assert (run.best_eval_loss, run.best_step, run.eval_loss) == (2.0, 2, 2.0)
