"""The inference server is shared between users, however many requests one of them sends."""

import threading

import pytest

from adapters.inference import request_queue
from adapters.inference import scheduler as scheduler_module
from adapters.inference.batch import Batch
from adapters.inference.model_cache import ModelCache
from adapters.inference.openai_http import InvalidField
from adapters.inference.openai_schemas import parse_stop_sequences
from adapters.inference.request_queue import RequestQueue
from adapters.inference.scheduler import BatchScheduler
from adapters.inference.types import BaseRef, GenerationRequest, QueueFull
from tests import tiny
from training.engine.data import render_limit

MESSAGES = [{"role": "user", "content": "turn on the hall lamp"}]


def make_request(tiny_model, user, **fields):
    return GenerationRequest(
        **{"base": BaseRef(tiny_model), "adapter": None, "user": user, "messages": MESSAGES}
        | {"max_tokens": 12, **fields}
    )


def wait_for_end(request):
    event = {}
    while "done" not in event and "error" not in event:
        event = request.events.get(timeout=60)
    return event


def run_scheduler(requests):
    """Submits all requests before the scheduler starts, and returns the users in the order in
    which their requests ended.
    """
    queue = RequestQueue()
    ended, finish_request = [], queue.finish_request

    def record_end(request, event):
        ended.append(request.user)
        finish_request(request, event)

    queue.finish_request = record_end
    for request in requests:
        queue.submit_request(request)
    threading.Thread(target=BatchScheduler(queue).run_forever, daemon=True).start()
    for request in requests:
        assert "done" in wait_for_end(request)
    return ended


def test_users_take_turns_however_many_requests_one_of_them_sent_first(tiny_model, monkeypatch):
    monkeypatch.setattr(scheduler_module, "MAX_ACTIVE_SEQUENCES", 1)
    users = ["flood"] * 6 + ["bob", "lea", "bob"]
    ended = run_scheduler([make_request(tiny_model, user) for user in users])
    assert ended == ["flood", "bob", "lea", "flood", "bob", "flood", "flood", "flood", "flood"]


def test_a_user_never_has_all_rows(tiny_model, monkeypatch):
    monkeypatch.setattr(scheduler_module, "MAX_ACTIVE_SEQUENCES", 4)
    monkeypatch.setattr(scheduler_module, "MAX_SEQUENCES_PER_USER", 3)
    sizes, decode_step = [], Batch.decode_step

    def record_size(batch, loaded_model):
        sizes.append(len(batch.sequences))
        return decode_step(batch, loaded_model)

    monkeypatch.setattr(Batch, "decode_step", record_size)
    run_scheduler([make_request(tiny_model, "flood") for _ in range(8)])
    assert max(sizes) == 3


def test_a_user_cannot_fill_the_queue(tiny_model, monkeypatch):
    monkeypatch.setattr(request_queue, "MAX_REQUESTS_PER_USER", 2)
    queue = RequestQueue()
    first = make_request(tiny_model, "flood")
    for request in (first, make_request(tiny_model, "flood")):
        queue.submit_request(request)
    with pytest.raises(QueueFull, match="2 of them yours"):
        queue.submit_request(make_request(tiny_model, "flood"))
    queue.submit_request(make_request(tiny_model, "bob"))
    queue.finish_request(first, {"done": "stop"})
    queue.submit_request(make_request(tiny_model, "flood"))
    assert queue.count == 3


def test_a_template_that_loops_stops_its_own_requests_only(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(render_limit, "MAX_SECONDS", 0.5)
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}"
    looping = tiny.make_model(tmp_path / "looping", template=loop)
    queue = RequestQueue()
    requests = [make_request(looping, "flood") for _ in range(5)] + [
        make_request(tiny_model, "bob")
    ]
    for request in requests:
        queue.submit_request(request)
    threading.Thread(target=BatchScheduler(queue).run_forever, daemon=True).start()
    ends = [wait_for_end(request) for request in requests]
    assert [end.get("code") for end in ends] == ["template_too_slow"] * 5 + [None]
    assert "done" in ends[-1]


def run_beside_flood(tiny_model, request, *, flood, steps, monkeypatch):
    """Keeps 20 requests of `flood` open while another user's request is answered. Returns the
    decode steps until then.
    """
    queue, is_done, count = RequestQueue(), threading.Event(), [0]
    decode_step, finish_request = Batch.decode_step, queue.finish_request

    def count_step(batch, loaded_model):
        count[0] += 1
        assert count[0] < steps, "the other user's request was not answered"
        return decode_step(batch, loaded_model)

    def replace_request(ended, event):
        finish_request(ended, event)
        if ended.user == "flood" and not is_done.is_set():
            queue.submit_request(make_request(tiny_model, "flood", **flood))

    monkeypatch.setattr(Batch, "decode_step", count_step)
    queue.finish_request = replace_request
    for _ in range(20):
        queue.submit_request(make_request(tiny_model, "flood", **flood))
    scheduler = BatchScheduler(queue)
    threading.Thread(target=scheduler.run_forever, daemon=True).start()
    queue.submit_request(request)
    assert "done" in wait_for_end(request)
    is_done.set()
    return scheduler, count[0]


def test_a_flood_of_requests_for_one_token_does_not_stop_the_decoding(tiny_model, monkeypatch):
    request = make_request(tiny_model, "bob", max_tokens=12)
    run_beside_flood(
        tiny_model, request, flood={"max_tokens": 1}, steps=100, monkeypatch=monkeypatch
    )


def test_a_user_with_long_answers_leaves_room_in_the_kv_cache(tiny_model, monkeypatch):
    sizes, admit, get_model = [], BatchScheduler._admit_request, ModelCache.get_model

    def get_endless_model(cache, *arguments):
        model = get_model(cache, *arguments)
        model.stop_ids = set()
        return model

    def record_rows(scheduler, request):
        is_admitted = admit(scheduler, request)
        if scheduler._cache_bytes() and not any(sizes):  # room for four such rows
            scheduler.model_cache.kv_cache_bytes = 4 * scheduler._cache_bytes()
        rows = [row.request.user for _, batch in scheduler.batches for row in batch.sequences]
        sizes.append(rows.count("flood"))
        return is_admitted

    monkeypatch.setattr(BatchScheduler, "_admit_request", record_rows)
    monkeypatch.setattr(ModelCache, "get_model", get_endless_model)
    request = make_request(tiny_model, "bob", max_tokens=40)
    run_beside_flood(
        tiny_model, request, flood={"max_tokens": 150}, steps=140, monkeypatch=monkeypatch
    )
    assert 1 <= max(sizes) <= 2


def test_stop_sequences_are_short(tiny_model):
    with pytest.raises(InvalidField, match="256 characters"):
        parse_stop_sequences(["x" * 257])
    assert parse_stop_sequences(["x" * 256]) == ("x" * 256,)


def test_a_base_model_that_cannot_be_loaded_is_not_loaded_again(monkeypatch, tmp_path):
    loads = []

    def fail_load(_cache, base, _busy):
        loads.append(base)
        raise ValueError("The weights are damaged.")

    monkeypatch.setattr(ModelCache, "get_model", fail_load)
    queue = RequestQueue()
    requests = [make_request(tmp_path, "alice") for _ in range(3)]
    for request in requests:
        queue.submit_request(request)
    threading.Thread(target=BatchScheduler(queue).run_forever, daemon=True).start()
    ends = [wait_for_end(request) for request in requests]
    assert loads.count(BaseRef(tmp_path)) == 1
    assert [end.get("code") for end in ends] == [None, "broken_model", "broken_model"]
