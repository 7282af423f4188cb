"""What the scheduler sees of a pool: devices, who holds them, who waits, and the quotas. Plain
numbers; it knows no database.

Times are seconds on one clock, memory is bytes. A run takes one device, or a share of one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

# Urgent is granted by admins; background is always preemptible
PRIORITIES = (
    "urgent",
    "normal",
    "background",
)
MAX_EVICTIONS_PER_DAY = 3  # of one run within a day; then it is left alone
EVICTION_GRACE_SECONDS = 60.0  # expected from being told to leave to being gone
NO_TEAM = 0  # the team of runs that belong to no team


@dataclass(frozen=True)
class DeviceState:
    """A device. `reserved_for`: a run for which another was stopped here; `taken`: bytes that programs
    hold which are no runs.
    """

    id: int
    total_bytes: int
    is_schedulable: bool = True
    reserved_for: int | None = None
    used_by_others: int = 0

    @property
    def free_bytes(self) -> int:
        """What runs can have of it now."""
        return max(0, self.total_bytes - self.used_by_others)


@dataclass(frozen=True)
class RunningJob:
    """A run on a device. `memory` None: it has the device alone. `ends`: expected, infinity where
    nobody knows.
    """

    run: int
    device_id: int
    team: int
    user: int
    started: float
    memory: int | None = None
    priority: str = "normal"
    expected_end: float = math.inf
    is_evicting: bool = False  # told to save and go
    is_protected: bool = False  # stopped for others often enough today


@dataclass(frozen=True)
class PendingJob:
    """A waiting run. `memory` None: nobody has forecast it, so it gets a device of its own."""

    run: int
    team: int
    user: int
    submitted: float
    memory: int | None = None
    priority: str = "normal"
    seconds: float = math.inf
    moved_up_at: float = 0.0  # when its owner moved it to the front of their own runs
    is_due: bool = True  # not before its pause after a crash is over

    @property
    def sort_key(self) -> tuple[int, float, float, int]:
        """Its place among its owner's runs."""
        return (PRIORITIES.index(self.priority), -self.moved_up_at, self.submitted, self.run)


@dataclass(frozen=True)
class TeamQuota:
    """A team's part of the pool. `limit` None: the whole pool. `seconds_left` None: no budget, or a
    soft one.
    """

    name: str = "no team"
    guaranteed: int = 0
    limit: int | None = None
    weight: float = 1.0
    seconds_left: float | None = None
    max_bytes: int | None = None
    is_on_hold: bool = False


@dataclass(frozen=True)
class UserUsage:
    """`used`: device-seconds of late, decayed with a half-life of a week; who used less comes
    first.
    """

    max_running: int | None = None
    running_elsewhere: int = 0  # devices that they hold in other pools
    seconds_left: float | None = None
    decayed_seconds: float = 0.0


@dataclass(frozen=True)
class PoolState:
    pool: str
    devices: Sequence[DeviceState]
    running_jobs: Sequence[RunningJob] = ()
    waiting: Sequence[PendingJob] = ()
    teams: Mapping[int, TeamQuota] = field(default_factory=dict)
    people: Mapping[int, UserUsage] = field(default_factory=dict)
    runs_per_device: int = 1  # runs that may share a device
    min_run_seconds: float = 600.0  # seconds that a run is left alone after each start
    is_on_hold: bool = False
    now: float = 0.0

    def quota_for(self, team: int) -> TeamQuota:
        return self.teams.get(team, TeamQuota())

    def usage_for(self, user: int) -> UserUsage:
        return self.people.get(user, UserUsage())


@dataclass(frozen=True)
class BlockReason:
    """Why a run does not start now: a word for the program, and the numbers for a sentence
    (explain.py).
    """

    code: str
    details: Mapping[str, float | int | str] = field(default_factory=dict)


@dataclass
class Decision:
    starts: list[RunningJob] = field(default_factory=list)
    evictions: dict[int, int] = field(default_factory=dict)  # victim -> the run for which it goes
    released_reservations: list[int] = field(
        default_factory=list
    )  # runs for which a device is kept no more
    # Of the runs that were looked at and did not start
    block_reasons: dict[int, BlockReason] = field(default_factory=dict)
