"""`manage.py up`: runs web, worker and inference under one parent, which restarts a child that
dies. Ctrl-C stops all in order.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import time
import urllib.request
from argparse import ArgumentParser
from types import FrameType
from typing import Any

from django.conf import settings
from django.core.management import CommandError, call_command
from django.core.management.base import BaseCommand
from django.db import connections

from snapml_site.backups import check_schema
from snapml_site.first_admin import prepare_first_admin
from snapml_site.processes import ManagedProcess, acquire_lock, build_processes
from training.errors import UserError

CHECK_INTERVAL = 0.2
START_TIMEOUT = 60.0


class StopFlag:
    """Set by a signal handler. A threading.Event would not do: it has a lock, so a second Ctrl-C
    while the first one sets it would deadlock.
    """

    def __init__(self) -> None:
        self.is_requested = False

    def set(self) -> None:
        self.is_requested = True

    def is_set(self) -> bool:
        return self.is_requested

    def wait(self, seconds: float) -> bool:
        if not self.is_requested:
            time.sleep(seconds)
        return self.is_requested


class Command(BaseCommand):
    help = "Start SnapML: web, worker and inference."

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("--port", type=int, default=8000)
        parser.add_argument(
            "--host",
            default="127.0.0.1",
            help="address to listen on; 0.0.0.0 for all (set SNAPML_HOSTS too)",
        )

    def handle(self, *args: Any, **options: Any) -> None:
        host, port = options["host"], options["port"]
        lock = acquire_lock()
        check_port_free(host, port)
        prepare_database()
        sign_in_message = prepare_first_admin()
        connections.close_all()
        # With INFERENCE_URL, an external server is used, such as vLLM
        has_own_inference = not settings.INFERENCE_URL
        if has_own_inference:
            os.environ |= {
                "INFERENCE_URL": f"http://127.0.0.1:{find_free_port()}",
                "INFERENCE_TOKEN": secrets.token_urlsafe(32),
            }
        stop_flag = StopFlag()

        def request_stop(_number: int, _frame: FrameType | None) -> None:
            stop_flag.set()

        for signal_number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signal_number, request_stop)
        processes = build_processes(host, port, has_own_inference=has_own_inference)
        web, *others = processes
        web.start()
        # S104: 0.0.0.0 is compared, not bound
        address = f"http://{'localhost' if host == '0.0.0.0' else host}:{port}/"  # noqa: S104
        if wait_until_up(address + "health", stop_flag):
            self.stdout.write(f"SnapML is at {address}  {sign_in_message}")
            self.stdout.flush()
        for child in others:
            child.start()
        supervise_processes(processes, stop_flag)
        self.stdout.write("Stopping. Training runs save a checkpoint first…")
        self.stdout.flush()
        for child in (*others, web):
            child.stop()
        self.stdout.write("Stopped.")
        lock.close()


def prepare_database() -> None:
    call_command("migrate", verbosity=0)
    try:
        check_schema()
    except UserError as error:
        raise CommandError(error.message) from error


def check_port_free(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise CommandError(
                f"Port {port} on {host} is not available ({error.strerror}). Try: make run "
                f"PORT={port + 1}"
            ) from error


def find_free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until_up(address: str, stop_flag: StopFlag) -> bool:
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline and not stop_flag.is_set():
        try:
            with urllib.request.urlopen(address, timeout=1):  # noqa: S310 our own loopback address
                return True
        except OSError:
            stop_flag.wait(0.05)
    return False


def supervise_processes(processes: list[ManagedProcess], stop_flag: StopFlag) -> None:
    while not stop_flag.wait(CHECK_INTERVAL):
        for child in processes:
            child.kill_if_stuck()
            child.restart_if_dead()
