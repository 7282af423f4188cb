"""Leases of runs: claim a run with one conditional UPDATE, renew the lease, and fence all writes by
its token.

The database's clock is the only clock. One statement claims a run only if it has no other holder,
and renews a lease only if the token is still valid. A worker whose UPDATE changes no row has lost
the run and stops.
"""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from django.db.models import F, Q
from django.db.models.functions import Now

from training.gpus.devices import update_devices_if_stale
from training.gpus.models import Allocation
from training.process_identity import get_host_name, get_process_name, is_alive
from training.runs.models import Run
from training.runs.queue import admission
from training.runs.states import ACTIVE, State

LEASE_SECONDS = 30
RENEW_SECONDS = 5


class LeaseLost(Exception):
    """This worker may no longer write to the run: another one has claimed it, or may have."""


@dataclass(frozen=True)
class Lease:
    """The right of this worker to write to a run."""

    run_id: int
    token: str

    def renew(self) -> None:
        """Extend the lease by LEASE_SECONDS. Raises LeaseLost."""
        self.update_run(lease_expires_at=Now() + timedelta(seconds=LEASE_SECONDS))

    def update_run(self, **changes: object) -> None:
        """Write to the run's row if the lease is still valid.

        Raises:
            LeaseLost: the token is no longer that of the run; nothing was written.
        """
        leased = Run.objects.filter(pk=self.run_id, lease_token=self.token).exclude(lease_token="")
        if not leased.update(**changes):
            raise LeaseLost("another worker has claimed it")


def claim_run(run_id: int) -> Lease | None:
    """Claim a queued run that has a device of this host, or an active one whose worker is dead.
    None if it is neither.
    """
    token = secrets.token_hex(16)
    lease_fields = {
        "lease_token": token,
        "lease_owner": get_process_name(),
        "lease_expires_at": Now() + timedelta(seconds=LEASE_SECONDS),
        "revision": F("revision") + 1,
    }
    assigned = Run.objects.filter(pk=run_id, pk__in=list_assigned_run_ids())
    if assigned.filter(build_orphaned_filter()).update(**lease_fields):
        return Lease(run_id, token)
    if not assigned.exists():
        update_devices_if_stale()
        admission.run_admission_pass(skip_run=run_id)
    claimed = assigned.filter(state=State.QUEUED, lease_token="").update(
        state=State.STARTING, phase="starting the engine", queue_info={}, **lease_fields
    )
    return Lease(run_id, token) if claimed else None


def list_assigned_run_ids() -> Any:
    """Runs that have a device of this host."""
    return Allocation.objects.filter(device__host__name=get_host_name(), released_at=None).values(
        "run_id"
    )


def build_orphaned_filter() -> Q:
    """Active runs without a running supervisor: the lease has expired, or its owner is a process of
    this host that has exited.
    """
    expired = Q(lease_expires_at__lt=Now())
    owners = Run.objects.filter(
        state__in=ACTIVE, lease_owner__startswith=get_host_name() + ":"
    ).values_list("lease_owner", flat=True)
    dead_owners = [owner for owner in owners.distinct() if not is_alive(owner)]
    return Q(state__in=ACTIVE) & (expired | Q(lease_owner__in=dead_owners))


def list_claimable_runs() -> list[int]:
    """Runs that have a device of this host and no supervisor, oldest first."""
    assigned = Run.objects.filter(pk__in=list_assigned_run_ids()).order_by("queued_at")
    return list(
        assigned.filter(
            build_orphaned_filter() | Q(state=State.QUEUED, lease_token="")
        ).values_list("pk", flat=True)
    )


class RateLimiter:
    """`is_due` returns True at most once in `seconds`."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.next_time = 0.0

    def is_due(self) -> bool:
        now = time.monotonic()
        if now < self.next_time:
            return False
        self.next_time = now + self.seconds
        return True
