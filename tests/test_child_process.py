"""Child programs: their messages, how they end, and that no process is left over."""

import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from tests.user_errors import raises_user_error
from training.child_process import ProgramLimits, RequestProcess, run_child, stream_child
from training.errors import UserError

ROOT = Path(__file__).parent.parent
LIMITS = ProgramLimits(address_space_bytes=2**32, counted_bytes=1)


def start_program(program, tmp_path, **options):
    log = tmp_path / "log" / "x.log"
    command = [sys.executable, "-c", program]
    return stream_child(command, log, cwd=tmp_path, environment={}, limits=LIMITS, **options)


def list_children():
    return psutil.Process().children()


def test_messages_are_yielded_as_they_arrive(tmp_path):
    program = "print('{\"done\": 1}'); print('{\"result\": {}}')"
    assert list(start_program(program, tmp_path)) == [{"done": 1}, {"result": {}}]


def test_an_error_message_of_a_child_becomes_a_user_error(tmp_path):
    program = 'print(\'{"error": "It is torn.", "field": "file"}\'); raise SystemExit(65)'
    with pytest.raises(UserError, match=r"It is torn\.") as error:
        list(start_program(program, tmp_path))
    assert error.value.field == "file"


def test_an_exit_code_without_a_message_names_the_log(tmp_path):
    with pytest.raises(UserError, match=r"code 3\..*log/x\.log"):
        list(start_program("raise SystemExit(3)", tmp_path))


def test_a_caller_that_stops_reading_ends_the_child(tmp_path):
    program = "import time; print('{}', flush=True); time.sleep(60)"
    before = list_children()
    messages = start_program(program, tmp_path)
    next(messages)
    messages.close()
    assert list_children() == before


def test_a_silent_child_ends_when_it_is_cancelled(tmp_path):
    cancelled = threading.Event()
    threading.Timer(0.5, cancelled.set).start()
    before = list_children()
    with pytest.raises(UserError, match="code -15"):
        list(start_program("import time; time.sleep(60)", tmp_path, cancelled=cancelled))
    assert list_children() == before


def test_output_that_is_not_a_message_names_the_log(tmp_path):
    with pytest.raises(UserError, match=r"'Loading\.\.\.'.*log/x\.log"):
        list(start_program("print('Loading...')", tmp_path))


def test_a_child_that_exits_when_idle_is_not_a_zombie(tmp_path):
    (tmp_path / "echo_once.py").write_text("print(input(), flush=True)")
    child = RequestProcess("echo_once", limits=LIMITS, max_seconds=30)
    before = list_children()
    for number in range(3):
        assert child.send_request({"n": number}, cwd=tmp_path) == {"n": number}
    end = time.monotonic() + 10
    while list_children() != before:
        assert time.monotonic() < end, [one.status() for one in list_children()]
        time.sleep(0.05)


def test_a_child_that_takes_too_long_is_killed(tmp_path):
    (tmp_path / "silent.py").write_text("import time; time.sleep(60)")
    child = RequestProcess("silent", limits=LIMITS, max_seconds=0.5)
    before = list_children()
    assert child.send_request({}, cwd=tmp_path) is None
    end = time.monotonic() + 10
    while list_children() != before:
        assert time.monotonic() < end
        time.sleep(0.05)


FULL = "SafetensorError('Error while serializing: I/O error: full (os error 28)')"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (FULL, "disk is full"),
        ("OSError(28, 'No space left on device')", "disk is full"),
        ("OSError(122, 'Disk quota exceeded', '/x/model.gguf')", "disk is full"),
        ("OSError('4096 requested and 12 written')", "disk is full"),
        ("OSError(30, 'Read-only file system')", "read-only"),
        ("PanicException('index out of bounds')", "index out of bounds"),
        ("PermissionError(13, 'Permission denied', '/x/model.gguf')", "model.gguf"),
    ],
)
def test_a_program_reports_an_error_of_the_disk_or_a_library_as_what_it_is(tmp_path, error, code):
    program = (
        "import sys; from training.child_process import main\n"
        "class SafetensorError(Exception): pass\n"
        "class PanicException(BaseException): pass\n"
        f"def run(): raise {error}\n"
        "sys.exit(main(run))"
    )
    command = [sys.executable, "-c", program]
    log = tmp_path / "x.log"
    with raises_user_error(naming=[code]):
        list(stream_child(command, log, cwd=ROOT, environment={}, limits=LIMITS))


WRITE_LARGE_FILE = "import pathlib; pathlib.Path('large').write_text('x' * 5000)"


@pytest.mark.parametrize(
    ("limits", "code", "error"),
    [
        ({"address_space_bytes": 2**28}, "x = b'x' * 2**28", "MemoryError"),
        ({"cpu_seconds": 1}, "while True: pass", ""),
        ({"file_bytes": 1000}, WRITE_LARGE_FILE, "File too large"),
    ],
)
def test_a_child_is_limited(tmp_path, limits, code, error):
    (tmp_path / "program.py").write_text(code)
    limits = {"address_space_bytes": 2**32, "counted_bytes": 1} | limits
    result = run_child("program", cwd=tmp_path, seconds=20, limits=ProgramLimits(**limits))
    assert result.returncode != 0
    assert error in result.stderr
