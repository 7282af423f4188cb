"""The inference server is shared between users, however many requests one of them sends."""

import threading

import pytest

from adapters.inference import request_queue
from adapters.inference import scheduler as scheduler_module
from adapters.inference.batch import Batch
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
