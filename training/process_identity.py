"""Identify a running process by host, pid and start time, and check whether it still runs.

The name is host:pid:start. The start time distinguishes the process from a later one with the same
pid.
"""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import psutil


def get_host_name() -> str:
    return socket.gethostname()


def get_process_name() -> str:
    """The name of this process."""
    return f"{get_host_name()}:{os.getpid()}:{get_process_start_time(os.getpid())}"


def is_alive(name: str) -> bool:
    """Whether the process still runs. Only for names of this host."""
    _, pid, start = name.rsplit(":", 2)
    return bool(start) and get_process_start_time(int(pid)) == start


def get_process_start_time(pid: int) -> str:
    """The start time of a running process, empty if there is none. On Linux it is in clock ticks
    since boot, so that changes of the wall clock do not affect it.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if fields[0] == "Z" else fields[19]  # the 3rd and the 22nd field of proc(5)
    except FileNotFoundError:
        pass
    try:
        return "" if sys.platform == "linux" else f"{psutil.Process(pid).create_time():.2f}"
    except psutil.NoSuchProcess:
        return ""
