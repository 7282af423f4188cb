"""Programs that we start: their messages, their ends, and nothing left of them."""

import sys
import threading
import time

import psutil
import pytest

from training.child_process import RequestProcess, stream_child
from training.errors import UserError


def start_program(program, tmp_path, **options):
    log = tmp_path / "log" / "x.log"
    command = [sys.executable, "-c", program]
    return stream_child(command, log, cwd=tmp_path, environment={}, **options)


def list_children():
    return psutil.Process().children()


def test_messages_come_as_they_are_said(tmp_path):
    program = "print('{\"done\": 1}'); print('{\"result\": {}}')"
    assert list(start_program(program, tmp_path)) == [{"done": 1}, {"result": {}}]


def test_what_a_child_says_is_wrong_is_an_error_for_the_person(tmp_path):
    program = 'print(\'{"error": "It is torn.", "field": "file"}\'); raise SystemExit(65)'
    with pytest.raises(UserError, match=r"It is torn\.") as error:
        list(start_program(program, tmp_path))
    assert error.value.field == "file"


def test_a_child_that_ends_without_a_word_is_told_with_its_log(tmp_path):
    with pytest.raises(UserError, match=r"code 3; its log is log/x\.log"):
        list(start_program("raise SystemExit(3)", tmp_path))


def test_who_stops_reading_ends_the_child_and_nothing_is_left_of_it(tmp_path):
    program = "import time; print('{}', flush=True); time.sleep(60)"
    before = list_children()
    messages = start_program(program, tmp_path)
    next(messages)
    messages.close()
    assert list_children() == before


def test_a_child_that_says_nothing_ends_when_it_is_cancelled(tmp_path):
    cancelled = threading.Event()
    threading.Timer(0.5, cancelled.set).start()
    before = list_children()
    with pytest.raises(UserError, match="code -15"):
        list(start_program("import time; time.sleep(60)", tmp_path, cancelled=cancelled))
    assert list_children() == before


def test_a_line_that_is_no_message_is_told_with_the_log(tmp_path):
    with pytest.raises(UserError, match=r"'Loading\.\.\.', not a message; its log is log/x\.log"):
        list(start_program("print('Loading...')", tmp_path))


def test_a_child_that_leaves_when_it_is_idle_is_no_zombie(tmp_path):
    (tmp_path / "echo_once.py").write_text("print(input(), flush=True)")
    child = RequestProcess("echo_once", max_seconds=30)
    before = list_children()
    for number in range(3):
        assert child.send_request({"n": number}, cwd=tmp_path) == {"n": number}
    end = time.monotonic() + 10
    while list_children() != before:
        assert time.monotonic() < end, [one.status() for one in list_children()]
        time.sleep(0.05)


def test_a_child_that_takes_too_long_is_killed_and_gone(tmp_path):
    (tmp_path / "silent.py").write_text("import time; time.sleep(60)")
    child = RequestProcess("silent", max_seconds=0.5)
    before = list_children()
    assert child.send_request({}, cwd=tmp_path) is None
    end = time.monotonic() + 10
    while list_children() != before:
        assert time.monotonic() < end
        time.sleep(0.05)
