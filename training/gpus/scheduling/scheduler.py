"""Who starts now, who waits, and who must go: one admission pass over a scene. The same code tells
times by running on a copy.

Order: inside the guarantee before borrowing, then class, then the team that has least over its
    guarantee for its weight, then the person who used least of late, then who asked first. The
    first run that finds no device keeps one (EASY backfill, Lifka 1995):
others start there only if they end before it can begin, or fit beside it.
"""

from __future__ import annotations

import bisect
import heapq
import math
from collections import defaultdict
from dataclasses import dataclass, replace

from training.gpus.scheduling.placement import PlacementState
from training.gpus.scheduling.preemption import victims_for
from training.gpus.scheduling.state import (
    PRIORITIES,
    BlockReason,
    Decision,
    PendingJob,
    PoolState,
    RunningJob,
)

# Runs behind the head that a pass tries to fit in (Slurm's bf_max_job_test: 500)
MAX_EXAMINED = 200
QueueKey = tuple[int, int]  # team and user: their runs in the order in which they want them


@dataclass(frozen=True)
class Reservation:
    """The device that waits for the head of the queue, and from when."""

    pending: PendingJob
    device_id: int
    available_at: float


class Scheduler(PlacementState):
    """A scene that moves: `admit` starts runs, `release` ends them."""

    def __init__(self, pool_state: PoolState) -> None:
        super().__init__(pool_state)
        self.charged_seconds: dict[int, float] = defaultdict(float)
        self.reservation: Reservation | None = None
        self.queues: dict[QueueKey, list[PendingJob]] = defaultdict(list)
        self.positions: dict[QueueKey, int] = defaultdict(int)  # how far a pass has come in each
        self.heap: list[tuple[tuple[float, ...], int, QueueKey]] = []
        self.versions: dict[QueueKey, int] = defaultdict(int)
        self.team_queues: dict[int, set[QueueKey]] = defaultdict(set)
        self.pending_jobs = {pending.run: pending for pending in pool_state.waiting}
        for pending in pool_state.waiting:
            queue_key = (pending.team, pending.user)
            self.queues[queue_key].append(pending)
            self.team_queues[pending.team].add(queue_key)
        self.required_sizes = sorted(
            self.get_required_bytes(pending) for pending in pool_state.waiting
        )
        for queue_key, queue in self.queues.items():
            queue.sort(key=lambda r: r.sort_key)
            self._push_queue(queue_key)

    # -- one pass

    def admit_jobs(self, now: float, *, evict: bool = True, depth: int = MAX_EXAMINED) -> Decision:
        """Start what may start at `now`; at most `depth` runs that find no device are looked at.

        With `evict`, say who must make room for runs inside their team's guarantee.
        """
        decision = Decision()
        self.reservation = None
        visited: set[QueueKey] = set()
        num_examined = 0
        while (
            self.heap
            and num_examined < depth
            and (evict or self.can_any_fit())
            and not self.pool_state.is_on_hold
        ):
            queue_key = self._pop_queue()
            if queue_key is None:
                break
            visited.add(queue_key)
            pending = self.queues[queue_key][self.positions[queue_key]]
            block = self.find_quota_block(pending)
            if block is not None and block.code != "pause":
                self._release_reservation(pending, decision)
            if block is None:
                device_id = self.find_device(pending, now)
                if device_id is not None:
                    decision.starts.append(self.start_job(pending, device_id, now))
                    continue
                block = self._evict_or_reserve(pending, now, decision, evict)
                num_examined += 1
            decision.block_reasons[pending.run] = block
            if not block.code.startswith(("team", "user")):  # else none of this line can start
                self.positions[queue_key] += 1  # the next of them comes in when it is its turn
                self._push_queue(queue_key)
        for queue_key in visited:
            self.positions[queue_key] = 0
            self._push_queue(queue_key)
        return decision

    def can_any_fit(self) -> bool:
        """Whether the smallest of those who wait finds room on the emptiest device; without, a pass
        has nothing to do.
        """
        return bool(self.required_sizes) and self.required_sizes[0] <= self.max_free_bytes

    def start_job(self, pending: PendingJob, device_id: int, now: float) -> RunningJob:
        job = RunningJob(
            pending.run,
            device_id,
            pending.team,
            pending.user,
            now,
            pending.memory,
            pending.priority,
            now + pending.seconds,
        )
        self.queues[pending.team, pending.user].remove(pending)
        del self.required_sizes[
            bisect.bisect_left(self.required_sizes, self.get_required_bytes(pending))
        ]
        self.add_job(job, since=now)
        # The entry is charged at once
        self.charged_seconds[pending.user] += (
            pending.seconds if pending.seconds < math.inf else 3600.0
        )
        if self.devices[device_id].reserved_for == pending.run:
            self.devices[device_id] = replace(self.devices[device_id], reserved_for=None)
            del self.reserved_devices[pending.run]
        self.reindex_device(device_id)
        self._reorder_team(pending.team)
        return job

    def release_job(self, run: int) -> None:
        job = self.remove_job(run)
        self._reorder_team(job.team)

    # -- what may be

    def find_quota_block(self, pending: PendingJob) -> BlockReason | None:
        """What forbids this run to start, however many devices are free."""
        quota, usage = (
            self.pool_state.quota_for(pending.team),
            self.pool_state.usage_for(pending.user),
        )
        team_count = (
            self.team_running[pending.team]
            + self.team_background[pending.team]
            + self.count_reserved(pending, "team")
        )
        user_count = (
            usage.running_elsewhere
            + self.user_running[pending.user]
            + self.count_reserved(pending, "user")
        )
        team_limit, user_limit = quota.limit, usage.max_running
        committed = (
            self.committed_seconds["team", pending.team],
            self.committed_seconds["user", pending.user],
        )
        checks: tuple[tuple[bool, str, dict[str, int | str]], ...] = (
            (quota.is_on_hold, "team_held", {"team": quota.name}),
            (
                team_limit is not None and team_count >= team_limit,
                "team_limit",
                {"team": quota.name, "holds": team_count, "limit": team_limit or 0},
            ),
            (
                quota.seconds_left is not None and quota.seconds_left <= committed[0],
                "team_hours",
                {"team": quota.name},
            ),
            (
                user_limit is not None and user_count >= user_limit,
                "user_limit",
                {"holds": user_count, "limit": user_limit or 0},
            ),
            (
                usage.seconds_left is not None and usage.seconds_left <= committed[1],
                "user_hours",
                {},
            ),
            (not pending.is_due, "pause", {}),
        )
        return next(
            (BlockReason(code, details) for is_blocked, code, details in checks if is_blocked), None
        ) or self.find_permanent_block(pending)

    def find_permanent_block(self, pending: PendingJob) -> BlockReason | None:
        """What would forbid it on an empty pool, too."""
        max_bytes = self.pool_state.quota_for(pending.team).max_bytes
        required_bytes = self.get_required_bytes(pending)
        if max_bytes is not None and required_bytes > max_bytes:
            return BlockReason("most_memory", {"needs": required_bytes, "most": max_bytes})
        if self.pool_state.devices and required_bytes > self.largest_device_bytes:
            return BlockReason(
                "never_fits", {"needs": required_bytes, "largest": self.largest_device_bytes}
            )
        return None

    def is_within_guarantee(self, pending: PendingJob) -> bool:
        """Whether this run would be inside its team's guarantee; background never is."""
        team_count = self.team_running[pending.team] + self.count_reserved(pending, "team")
        return (
            pending.priority != "background"
            and team_count < self.pool_state.quota_for(pending.team).guaranteed
        )

    def count_reserved(self, pending: PendingJob, owner_field: str) -> int:
        """Devices that are kept for other waiting runs of the same team or user: as good as
        held.
        """
        owner_id = getattr(pending, owner_field)
        others = (
            self.pending_jobs[run]
            for run in self.reserved_devices
            if run != pending.run and run in self.pending_jobs
        )
        return sum(getattr(other, owner_field) == owner_id for other in others)

    def find_device(self, pending: PendingJob, now: float) -> int | None:
        """The device with the least room left that takes this run."""
        reserved_device_id = self.reserved_devices.get(pending.run)
        if reserved_device_id is not None:
            return (
                reserved_device_id
                if self.devices[reserved_device_id].is_schedulable
                and self.can_place(pending, reserved_device_id)
                else None
            )
        for _, device_id in self.open_devices[
            bisect.bisect_left(self.open_devices, (self.get_required_bytes(pending), -1)) :
        ]:
            if self.devices[device_id].reserved_for is not None or not self.can_place(
                pending, device_id
            ):
                continue
            if (
                self.reservation is None
                or self.reservation.device_id != device_id
                or self._can_backfill(self.reservation, pending, now)
            ):
                return device_id
        return None

    def get_required_bytes(self, pending: PendingJob) -> int:
        """Room that it needs at least; one without a forecast needs a device that nobody is on."""
        return pending.memory if pending.memory is not None else self.smallest_device_bytes

    # -- inside

    def _evict_or_reserve(
        self, pending: PendingJob, now: float, decision: Decision, evict: bool
    ) -> BlockReason:
        reserved_device_id = self.reserved_devices.get(pending.run)
        if reserved_device_id is not None:
            evicting_runs = ", ".join(str(job.run) for job in self.jobs_on[reserved_device_id])
            return (
                BlockReason("leaving", {"for": evicting_runs})
                if evicting_runs
                else BlockReason("checked")
            )
        if evict and (self.is_within_guarantee(pending) or pending.priority == "urgent"):
            eviction_plan = victims_for(self, pending, now)
            if eviction_plan is not None:
                device_id, victims = eviction_plan
                decision.evictions |= {job.run: pending.run for job in victims}
                self.mark_evicting(device_id, victims, pending.run)
                return BlockReason("leaving", {"for": ", ".join(str(job.run) for job in victims)})
        if self.reservation is None:
            self.reservation = self._reserve_for_head(pending, now)
        if (
            self.reservation is None
            or self.reservation.pending.run == pending.run
            or self.max_free_bytes < self.get_required_bytes(pending)
        ):
            return BlockReason("full", self.get_capacity_details(pending))
        return BlockReason(
            "kept", {**self.get_capacity_details(pending), "head": self.reservation.pending.run}
        )

    def _release_reservation(self, pending: PendingJob, decision: Decision) -> None:
        """What was freed for a run that may not start now is for all again."""
        device_id = self.reserved_devices.pop(pending.run, None)
        if device_id is not None:
            self.devices[device_id] = replace(self.devices[device_id], reserved_for=None)
            decision.released_reservations.append(pending.run)

    def _reserve_for_head(self, pending: PendingJob, now: float) -> Reservation | None:
        """Where and when the head can begin first, going by the expected ends."""
        best: Reservation | None = None
        for device in self.devices.values():
            if (
                not device.is_schedulable
                or device.reserved_for is not None
                or (pending.memory or 0) > device.free_bytes
            ):
                continue
            available_at = max(now, self.estimate_available_at(pending, device))
            if best is None or available_at < best.available_at:
                best = Reservation(pending, device.id, available_at)
        return best

    def _can_backfill(self, reservation: Reservation, pending: PendingJob, now: float) -> bool:
        """Whether the head of the queue begins no later if this run starts on its device."""
        head = reservation.pending
        if head.run == pending.run or now + pending.seconds <= reservation.available_at < math.inf:
            return True
        ending_jobs = [
            job
            for job in self.jobs_on[reservation.device_id]
            if job.expected_end <= reservation.available_at
        ]
        return head.memory is not None and self.can_place(
            pending, reservation.device_id, without=ending_jobs, reserved_bytes=head.memory
        )

    def get_sort_key(self, pending: PendingJob) -> tuple[float, ...]:
        """Its place in the order: the smaller comes first."""
        quota = self.pool_state.quota_for(pending.team)
        over_guarantee = (self.team_running[pending.team] - quota.guaranteed) / quota.weight
        used_seconds = (
            self.pool_state.usage_for(pending.user).decayed_seconds
            + self.charged_seconds[pending.user]
        )
        return (
            not self.is_within_guarantee(pending),
            PRIORITIES.index(pending.priority),
            over_guarantee,
            used_seconds,
            pending.submitted,
            pending.run,
        )

    def _push_queue(self, queue_key: QueueKey) -> None:
        self.versions[queue_key] += 1
        if self.positions[queue_key] < len(self.queues[queue_key]):
            key = self.get_sort_key(self.queues[queue_key][self.positions[queue_key]])
            heapq.heappush(self.heap, (key, self.versions[queue_key], queue_key))

    def _pop_queue(self) -> QueueKey | None:
        while self.heap:
            _, version, queue_key = heapq.heappop(self.heap)
            if version == self.versions[queue_key]:
                return queue_key
        return None

    def _reorder_team(self, team: int) -> None:
        """A team's place in the order has changed."""
        for queue_key in self.team_queues[team]:
            self._push_queue(queue_key)
