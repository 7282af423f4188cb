"""Who watches a run: claimed by one conditional UPDATE, held by a lease, fenced by its token.

The database's clock is the only clock. A claim asks, in one statement, for a run that nobody holds; a renewal asks for its own
token. Whoever's UPDATE changes no row has lost, and stops.
"""

from __future__ import annotations

import os
import secrets
import socket
import sys
import time
import zlib
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import psutil
from django.conf import settings
from django.db import connection, transaction
from django.db.models import F, Q
from django.db.models.functions import Now

from training.runs.models import Run
from training.runs.states import ACTIVE, State

LEASE_SECONDS = 30
RENEW_SECONDS = 5


class LeaseLost(Exception):
    """Another worker holds this run now; this one must not write about it any more."""


@dataclass(frozen=True)
class Lease:
    run_id: int
    token: str

    def renew(self) -> None:
        """Raises LeaseLost."""
        self.update(lease_expires_at=Now() + timedelta(seconds=LEASE_SECONDS))

    def update(self, **changes: object) -> None:
        """Write to the run's row under the fence.

        Raises:
            LeaseLost: the token is not the run's any more; nothing was written.
        """
        if not Run.objects.filter(pk=self.run_id, lease_token=self.token).update(**changes):
            raise LeaseLost(f"run {self.run_id}")


def claim(run_id: int) -> Lease | None:
    """Take a waiting run if this host has a free slot, or an active one whose worker is dead. None: nothing to do."""
    token = secrets.token_hex(16)
    taken = {
        "lease_token": token,
        "lease_owner": owner_name(),
        "lease_expires_at": Now() + timedelta(seconds=LEASE_SECONDS),
        "revision": F("revision") + 1,
    }
    with transaction.atomic():
        one_claim_at_a_time()
        orphan = Run.objects.filter(pk=run_id).filter(orphaned()).update(**taken)
        if orphan:
            return Lease(run_id, token)
        if held_here() >= settings.SLOTS:
            return None
        waiting = Run.objects.filter(pk=run_id, state=State.QUEUED, lease_token="").filter(due())
        changed = waiting.update(state=State.STARTING, phase="starting the engine", **taken)
    return Lease(run_id, token) if changed else None


def one_claim_at_a_time() -> None:
    """Slots are counted and taken in one go: SQLite's IMMEDIATE sees to it, PostgreSQL needs a lock of this host's own."""
    if connection.vendor == "postgresql":
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_advisory_xact_lock(%s)", [zlib.crc32(host().encode())])


def due() -> Q:
    return Q(not_before=None) | Q(not_before__lte=Now())


def orphaned() -> Q:
    """Active runs without a living watcher: the lease ran out, or its owner is a process of this host that is gone."""
    expired = Q(lease_expires_at__lt=Now())
    owners = Run.objects.filter(state__in=ACTIVE, lease_owner__startswith=host() + ":").values_list("lease_owner", flat=True)
    dead = [owner for owner in owners.distinct() if not is_alive(owner)]
    return Q(state__in=ACTIVE) & (expired | Q(lease_owner__in=dead))


def claimable_runs() -> list[int]:
    """Runs that a worker of this host should look at now, oldest first."""
    orphans = Run.objects.filter(orphaned()).order_by("queued_at").values_list("pk", flat=True)
    waiting = Run.objects.filter(due(), state=State.QUEUED, lease_token="").order_by("queued_at").values_list("pk", flat=True)
    free = max(0, settings.SLOTS - held_here())
    return [*orphans, *waiting[:free]]


def held_here() -> int:
    """Runs that take a slot of this host: active, whoever of this host watches them."""
    return Run.objects.filter(state__in=ACTIVE, lease_owner__startswith=host() + ":").count()


def host() -> str:
    return socket.gethostname()


def owner_name() -> str:
    """host:pid:start; the start tells a process from a later one with the same pid."""
    return f"{host()}:{os.getpid()}:{start_of(os.getpid())}"


def is_alive(owner: str) -> bool:
    _, pid, started = owner.rsplit(":", 2)
    return bool(started) and start_of(int(pid)) == started


def start_of(pid: int) -> str:
    """When a living process began: on Linux in clock ticks since boot, which no change of the wall clock moves."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if fields[0] == "Z" else fields[19]  # the 3rd and the 22nd field of proc(5)
    except FileNotFoundError:
        pass
    try:
        return "" if sys.platform == "linux" else f"{psutil.Process(pid).create_time():.2f}"
    except psutil.NoSuchProcess:
        return ""


class Every:
    """True at most once in so many seconds."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.next = 0.0

    def due(self) -> bool:
        now = time.monotonic()
        if now < self.next:
            return False
        self.next = now + self.seconds
        return True
