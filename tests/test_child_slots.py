"""A host runs a limited number of child programs at a time, and no user takes all of them."""

import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.user_errors import raises_user_error
from training.child_slots import ChildSlots, SlotsBusy

ROOT = Path(__file__).parent.parent
HOLD_PROGRAM = """
import sys
from pathlib import Path
from training.child_slots import ChildSlots
with ChildSlots(Path(sys.argv[1]), 1).hold_background_slot(on_wait=lambda: None):
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def slots(tmp_path):
    return ChildSlots(tmp_path / "slots", 2)


def hold_background(slots, **options):
    return slots.hold_background_slot(on_wait=lambda: None, **options)


def test_all_slots_and_the_interactive_one_can_be_held_at_once(slots):
    with ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(hold_background(slots))
        stack.enter_context(slots.hold_interactive_slot("alice", seconds=0))
        with raises_user_error(SlotsBusy, code="slots_busy"):
            stack.enter_context(slots.hold_interactive_slot("bob", seconds=0))
    with slots.hold_interactive_slot("bob", seconds=0):
        pass


def test_a_user_never_has_all_slots(slots):
    alices = [slots.hold_interactive_slot("alice", seconds=0) for _ in range(2)]
    with alices[0], alices[1]:
        with raises_user_error(SlotsBusy), slots.hold_interactive_slot("alice", seconds=0.1):
            pass
        with slots.hold_interactive_slot("bob", seconds=0):
            pass


def test_a_flood_of_one_user_does_not_delay_another(slots):
    running, most, lock = 0, 0, threading.Lock()

    def run_programs():
        nonlocal running, most
        with slots.hold_interactive_slot("flood", seconds=30):
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
        with slots.hold_interactive_slot("other", seconds=0):
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
            with slots.hold_background_slot(on_wait=lambda: events.append("waits")):
                events.append("runs")

        thread = threading.Thread(target=wait)
        thread.start()
        while not events:
            time.sleep(0.01)
        assert events == ["waits"]
    thread.join(10)
    assert events == ["waits", "runs"]


def test_a_cancelled_program_waits_no_longer(slots):
    cancelled = threading.Event()
    cancelled.set()
    with (
        hold_background(slots),
        hold_background(slots),
        hold_background(slots, cancelled=cancelled),
    ):
        pass


def test_a_slot_of_a_killed_process_is_free_again(tmp_path):
    folder = tmp_path / "slots"
    command = [sys.executable, "-c", HOLD_PROGRAM, str(folder)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as holder:
        assert holder.stdout.readline() == "held\n"
        slots = ChildSlots(folder, 1)
        with slots.hold_interactive_slot("alice", seconds=0):  # in the slot that is kept for pages
            with raises_user_error(SlotsBusy), slots.hold_interactive_slot("bob", seconds=0.1):
                pass
            holder.kill()
            holder.wait()
            with slots.hold_interactive_slot("bob", seconds=5):
                pass
