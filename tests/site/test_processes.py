"""`manage.py up` restarts a process that has died or does not respond."""

import sys
import time
import urllib.request

import pytest

from snapml_site import processes
from snapml_site.processes import HealthCheck, ManagedProcess
from tests.running_site import find_free_port

SERVER = """
import sys, time
from http.server import BaseHTTPRequestHandler, HTTPServer
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/stuck":
            time.sleep(600)  # this server has one thread
        self.send_response(200)
        self.end_headers()
    def log_message(self, *arguments):
        pass
HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@pytest.fixture
def managed(monkeypatch):
    monkeypatch.setattr(processes, "STUCK_SECONDS", 1.0)
    monkeypatch.setattr(processes, "HEALTH_CHECK_SECONDS", 0.1)
    port = find_free_port()
    process = ManagedProcess(
        "server",
        [sys.executable, "-c", SERVER, str(port)],
        stop_timeout=5,
        health_check=HealthCheck(port),
    )
    process.port = port
    process.start()
    yield process
    process.stop()


def supervise(process, *, until, seconds=20):
    end = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < end
        process.kill_if_stuck()
        process.restart_if_dead()
        time.sleep(0.05)


def answers(process):
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{process.port}/health", timeout=0.5).close()
    except OSError:
        return False
    return True


def test_a_process_that_does_not_respond_is_killed_and_restarted(managed, capfd):
    supervise(managed, until=lambda: answers(managed))
    first = managed.process.pid
    with pytest.raises(OSError):
        urllib.request.urlopen(f"http://127.0.0.1:{managed.port}/stuck", timeout=0.2)
    supervise(managed, until=lambda: managed.process and managed.process.pid != first)
    supervise(managed, until=lambda: answers(managed))
    assert "server does not respond; killing it." in capfd.readouterr().err


def test_a_process_that_responds_is_left_alone(managed):
    supervise(managed, until=lambda: answers(managed))
    first, end = managed.process.pid, time.monotonic() + 3
    supervise(managed, until=lambda: time.monotonic() > end)
    assert managed.process.pid == first
