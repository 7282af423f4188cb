"""A host runs a limited number of child programs at a time, and no user takes all of them."""

import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.user_errors import raises_user_error
from training import child_slots
from training.child_slots import ChildSlots, SlotsBusy

ROOT = Path(__file__).parent.parent
HOLD_PROGRAM = """
import sys
from pathlib import Path
from training import child_slots
from training.child_slots import ChildSlots
with ChildSlots(Path(sys.argv[1]), 1, 99).hold_background_slot(1, on_wait=lambda: None):
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def slots(tmp_path):
    return ChildSlots(tmp_path / "slots", 2, memory_bytes=100)


def hold_background(slots, memory_bytes=1, on_wait=lambda: None):
    return slots.hold_background_slot(memory_bytes, on_wait=on_wait)


def hold_interactive(slots, username, memory_bytes=1, *, seconds=0):
    return slots.hold_interactive_slot(username, memory_bytes, seconds=seconds)


def test_all_slots_and_the_interactive_one_can_be_held_at_once(slots):
    with ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(hold_background(slots))
        stack.enter_context(hold_interactive(slots, "alice", seconds=0))
        with raises_user_error(SlotsBusy, code="slots_busy"):
            stack.enter_context(hold_interactive(slots, "bob", seconds=0))
    with hold_interactive(slots, "bob", seconds=0):
        pass


def test_a_user_never_has_all_slots(slots):
    alices = [hold_interactive(slots, "alice", seconds=0) for _ in range(2)]
    with alices[0], alices[1]:
        with raises_user_error(SlotsBusy), hold_interactive(slots, "alice", seconds=0.1):
            pass
        with hold_interactive(slots, "bob", seconds=0):
            pass


def test_a_flood_of_one_user_does_not_delay_another(slots):
    running, most, lock = 0, 0, threading.Lock()

    def run_programs():
        nonlocal running, most
        with hold_interactive(slots, "flood", seconds=30):
            with lock:
                running += 1
                most = max(most, running)
            time.sleep(0.05)
            with lock:
                running -= 1

    threads = [threading.Thread(target=run_programs) for _ in range(10)]
    for thread in threads:
        thread.start()
    for _ in range(5):
        with hold_interactive(slots, "other", seconds=1):
            time.sleep(0.01)
    for thread in threads:
        thread.join()
    assert most == 2


def test_a_background_program_waits_for_a_slot_and_says_so(slots):
    events = []
    with ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(hold_background(slots))

        def wait():
            with hold_background(slots, on_wait=lambda: events.append("waits")):
                events.append("runs")

        thread = threading.Thread(target=wait)
        thread.start()
        while not events:
            time.sleep(0.01)
        assert set(events) == {"waits"}
    thread.join(10)
    assert events[-1] == "runs"


def test_what_is_called_while_waiting_may_give_up(slots):
    def give_up():
        raise InterruptedError

    with hold_background(slots), hold_background(slots), pytest.raises(InterruptedError):
        hold_background(slots, on_wait=give_up).__enter__()


def test_users_take_turns_at_the_last_slot_while_jobs_hold_the_others(slots):
    order, is_done = [], threading.Event()

    def flood():
        while not is_done.is_set():
            with hold_interactive(slots, "flood", seconds=30):
                order.append("flood")
                time.sleep(0.02)

    with hold_background(slots), hold_background(slots):
        threads = [threading.Thread(target=flood) for _ in range(5)]
        for thread in threads:
            thread.start()
        for _ in range(4):
            before = len(order)
            with hold_interactive(slots, "other", seconds=5):
                assert order[before:].count("flood") <= 2
        is_done.set()
        for thread in threads:
            thread.join()


def test_a_user_cannot_make_the_server_wait_without_end(slots, monkeypatch):
    monkeypatch.setattr(child_slots, "MAX_WAITING_PER_USER", 2)
    with hold_background(slots), hold_background(slots), hold_interactive(slots, "alice"):
        waiting = [
            threading.Thread(target=hold_interactive(slots, "bob", seconds=1).__enter__)
            for _ in range(2)
        ]
        for thread in waiting:
            thread.start()
        time.sleep(0.2)
        started = time.monotonic()
        with raises_user_error(SlotsBusy):
            hold_interactive(slots, "bob", seconds=30).__enter__()
        assert time.monotonic() - started < 1
    for thread in waiting:
        thread.join()


def test_programs_of_a_kind_start_while_there_is_memory_for_all(slots):
    with hold_interactive(slots, "alice", 30):
        with raises_user_error(SlotsBusy):
            hold_interactive(slots, "bob", 30).__enter__()
        with hold_interactive(slots, "bob", 20):
            pass


def test_a_large_job_starts_alone_and_does_not_delay_pages(slots):
    def give_up():
        raise InterruptedError

    with (
        hold_interactive(slots, "alice", 50),
        hold_background(slots, 1000),
        pytest.raises(InterruptedError),
    ):
        hold_background(slots, 1, on_wait=give_up).__enter__()
    with hold_background(slots, 1000), hold_interactive(slots, "alice", 50):
        pass


def test_a_slot_of_a_killed_process_is_free_again(tmp_path):
    folder = tmp_path / "slots"
    command = [sys.executable, "-c", HOLD_PROGRAM, str(folder)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as holder:
        assert holder.stdout.readline() == "held\n"
        slots = ChildSlots(folder, 1, memory_bytes=99)
        with hold_interactive(slots, "alice", seconds=0):  # in the slot that is kept for pages
            with raises_user_error(SlotsBusy), hold_interactive(slots, "bob", seconds=0.1):
                pass
            holder.kill()
            holder.wait()
            with hold_interactive(slots, "bob", seconds=5):
                pass
