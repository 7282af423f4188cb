"""The queue delivers messages at once and costs no CPU time while idle."""

import threading
import time

import pytest
from huey import Huey

from training.jobs.consumer import QueueConsumer
from training.sqlite_queue import BlockingSqliteStorage


@pytest.fixture
def open_queue(tmp_path):
    def make_queue():
        return Huey(
            "q",
            storage_class=BlockingSqliteStorage,
            filename=str(tmp_path / "queue.sqlite3"),
            immediate=False,
            results=False,
        )

    return make_queue


@pytest.fixture
def consumer(open_queue):
    """A consumer with 5 threads, and the numbers that its tasks received."""
    huey, numbers = open_queue(), []
    # Huey needs a function: a bound method has no module.
    task = huey.task(name="note")(lambda number: numbers.append(number))  # noqa: PLW0108
    running = QueueConsumer(huey, threads=5)
    running._set_signal_handlers = lambda: None
    running.start()
    yield task, numbers
    running.stop(graceful=True)


def wait_for(condition, seconds=10):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_messages_of_all_processes_arrive_once(consumer, open_queue):
    task, numbers = consumer
    other = open_queue().task(name="note")(lambda _number: None)  # a connection of its own
    for number in range(20):
        (task if number % 2 else other)(number)
    wait_for(lambda: len(numbers) == 20)
    assert sorted(numbers) == list(range(20))


def test_a_message_to_a_queue_that_has_been_idle_arrives_quickly(consumer, open_queue):
    _, numbers = consumer
    other = open_queue().task(name="note")(lambda _number: None)
    time.sleep(1)
    started = time.monotonic()
    other(1)
    wait_for(lambda: numbers)
    assert time.monotonic() - started < 0.5


def test_waiting_threads_use_almost_no_cpu_time(consumer):
    time.sleep(0.2)
    started = time.process_time()
    time.sleep(2)
    assert time.process_time() - started < 0.1


def test_a_consumer_stops_at_once_while_its_threads_wait(open_queue):
    running = QueueConsumer(open_queue(), threads=5)
    running._set_signal_handlers = lambda: None
    running.start()
    started = time.monotonic()
    running.stop(graceful=True)
    assert time.monotonic() - started < 3
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("Worker-")]
