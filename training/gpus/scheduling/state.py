"""The scheduler's view of one pool: devices, running and waiting runs, and quotas. Plain numbers
without database access.

Times are seconds on one clock and memory is in bytes. A run uses one device or a part of one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

# From first to last. Only admins grant `urgent`; `background` runs can always be preempted.
PRIORITIES = ("urgent", "normal", "background")
MAX_EVICTIONS_PER_DAY = 3  # per run; a run that reached it is protected
EVICTION_GRACE_SECONDS = 60.0  # expected time from the request to the freed device
NO_TEAM = 0  # stands for the users without a team


@dataclass(frozen=True)
class DeviceState:
    """A device.

    `reserved_for` is the run for which other runs were evicted here. `used_by_others` are the bytes
    used by processes that are not runs of SnapML.
    """

    id: int
    total_bytes: int
    is_schedulable: bool = True
    reserved_for: int | None = None
    used_by_others: int = 0

    @property
    def free_bytes(self) -> int:
        """Bytes that runs can use."""
        return max(0, self.total_bytes - self.used_by_others)


@dataclass(frozen=True)
class RunningRun:
    """A run on a device.

    `memory` is None if the run has the whole device. `expected_end` is infinite if it is unknown.
    """

    run: int
    device_id: int
    team: int
    user: int
    started: float
    memory: int | None = None
    priority: str = "normal"
    expected_end: float = math.inf
    is_evicting: bool = False  # it was asked to save a checkpoint and exit
    is_protected: bool = False  # it reached MAX_EVICTIONS_PER_DAY


@dataclass(frozen=True)
class WaitingRun:
    """A waiting run. `memory` is None if there is no forecast; such a run needs a whole device."""

    run: int
    team: int
    user: int
    submitted: float
    memory: int | None = None
    priority: str = "normal"
    seconds: float = math.inf  # expected duration
    moved_up_at: float = 0.0  # when the owner moved it to the front of their own runs
    is_retry_due: bool = True  # False during the pause after a crash

    @property
    def sort_key(self) -> tuple[int, float, float, int]:
        """The order among the runs of one owner."""
        return (PRIORITIES.index(self.priority), -self.moved_up_at, self.submitted, self.run)


@dataclass(frozen=True)
class TeamQuota:
    """A team's quota in the pool.

    `limit` is None if the team may use the whole pool. `seconds_left` is None if the team has no
    budget or only a soft one.
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
    """What a user uses and may use.

    `decayed_seconds` are the device-seconds used recently, with a half-life of a week. The user
    with fewer comes first.
    """

    max_running: int | None = None
    running_elsewhere: int = 0  # devices that the user occupies in other pools
    seconds_left: float | None = None
    decayed_seconds: float = 0.0


@dataclass(frozen=True)
class PoolState:
    """Everything that one admission pass depends on."""

    pool: str
    devices: Sequence[DeviceState]
    running: Sequence[RunningRun] = ()
    waiting: Sequence[WaitingRun] = ()
    teams: Mapping[int, TeamQuota] = field(default_factory=dict)
    users: Mapping[int, UserUsage] = field(default_factory=dict)
    runs_per_device: int = 1  # maximum number of runs that share a device
    min_run_seconds: float = 600.0  # a run is not preempted earlier after its start
    is_on_hold: bool = False
    now: float = 0.0

    def quota_for(self, team: int) -> TeamQuota:
        return self.teams.get(team, TeamQuota())

    def usage_for(self, user: int) -> UserUsage:
        return self.users.get(user, UserUsage())


BlockCode = Literal[
    "full",
    "reserved",
    "behind",
    "evicting",
    "checking_device",
    "pool_on_hold",
    "team_on_hold",
    "team_limit",
    "team_hours",
    "user_limit",
    "user_hours",
    "crash_pause",
    "max_memory",
    "never_fits",
    "no_devices",
]


@dataclass(frozen=True)
class BlockReason:
    """Why a run does not start now: a code, and the figures for its message (wait_messages.py)."""

    code: BlockCode
    details: Mapping[str, float | int | str] = field(default_factory=dict)


@dataclass
class Decision:
    """The result of one admission pass."""

    starts: list[RunningRun] = field(default_factory=list)
    evictions: dict[int, int] = field(default_factory=dict)  # evicted run -> run that replaces it
    # Runs whose reserved device is free for others again
    released_reservations: list[int] = field(default_factory=list)
    # For the runs that the pass examined and did not start
    block_reasons: dict[int, BlockReason] = field(default_factory=dict)
