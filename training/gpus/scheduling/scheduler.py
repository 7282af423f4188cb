"""The admission pass: decide which waiting runs start, which wait, and which running runs are
evicted. eta.py runs the same code on a copy to estimate start times.

Order of the queue: runs within their team's guarantee first, then by priority, then the team with
the fewest devices over its guarantee (divided by its weight), then the user with the least recent
usage, then the time of submission.

The first run that finds no device gets a reservation (EASY backfill, Lifka 1995): later runs start
on that device only if they end before the first run can start, or fit next to it.
"""

from __future__ import annotations

import bisect
import heapq
import math
from collections import defaultdict
from dataclasses import dataclass, replace

from training.gpus.scheduling.placement import PlacementState
from training.gpus.scheduling.preemption import find_victims
from training.gpus.scheduling.state import (
    PRIORITIES,
    BlockCode,
    BlockReason,
    Decision,
    PoolState,
    RunningRun,
    WaitingRun,
)

# Runs without a free device that one pass examines (Slurm's bf_max_job_test: 500)
MAX_EXAMINED = 200
# Team and user. Each pair has a queue of its own, in the order that the user chose.
QueueKey = tuple[int, int]


@dataclass(frozen=True)
class Reservation:
    """The device that the first blocked run will get, and when it is expected to be free."""

    waiting_run: WaitingRun
    device_id: int
    available_at: float


class Scheduler(PlacementState):
    """Runs admission passes over a copy of the pool's state.

    `admit_runs` starts runs and `release_run` ends them. Every (team, user) pair has a queue, and
    the heap has the first run of each queue that the pass has not examined yet. Entries of the heap
    are never updated: a change pushes a new entry with a higher version, and stale ones are
    skipped.
    """

    def __init__(self, pool_state: PoolState) -> None:
        super().__init__(pool_state)
        self.charged_seconds: dict[int, float] = defaultdict(float)
        self.reservation: Reservation | None = None
        self.queues: dict[QueueKey, list[WaitingRun]] = defaultdict(list)
        # Index of the next run that the pass examines in each queue
        self.positions: dict[QueueKey, int] = defaultdict(int)
        self.heap: list[tuple[tuple[float, ...], int, QueueKey]] = []
        self.versions: dict[QueueKey, int] = defaultdict(int)
        self.team_queues: dict[int, set[QueueKey]] = defaultdict(set)
        self.waiting_runs = {waiting_run.run: waiting_run for waiting_run in pool_state.waiting}
        for waiting_run in pool_state.waiting:
            queue_key = (waiting_run.team, waiting_run.user)
            self.queues[queue_key].append(waiting_run)
            self.team_queues[waiting_run.team].add(queue_key)
        self.required_sizes = sorted(
            self.get_required_bytes(waiting_run) for waiting_run in pool_state.waiting
        )
        for queue_key, queue in self.queues.items():
            queue.sort(key=lambda r: r.sort_key)
            self._push_queue(queue_key)

    # -- the admission pass

    def admit_runs(self, now: float, *, evict: bool = True, depth: int = MAX_EXAMINED) -> Decision:
        """Run one admission pass at `now` and return the decision.

        The pass ends after `depth` runs that found no device. With `evict`, it also chooses runs to
        evict for those within their team's guarantee. A pass that may not evict ends early if the
        smallest waiting run fits nowhere.
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
            # Take the queue whose next run comes first in the order of the pool
            queue_key = self._pop_queue()
            if queue_key is None:
                break
            visited.add(queue_key)
            waiting_run = self.queues[queue_key][self.positions[queue_key]]

            # A run that its quota blocks gives up a device that was reserved for it
            block = self.find_quota_block(waiting_run)
            if block is not None and block.code != "crash_pause":
                self._release_reservation(waiting_run, decision)

            # Start the run on a device. If there is none, evict others or reserve a device for it.
            if block is None:
                device_id = self.find_device(waiting_run, now)
                if device_id is not None:
                    decision.starts.append(self.start_run(waiting_run, device_id, now))
                    continue
                block = self._evict_or_reserve(waiting_run, now, decision, evict)
                num_examined += 1
            decision.block_reasons[waiting_run.run] = block

            # A quota that blocks this run blocks the rest of its queue too. Otherwise the next run
            # of the queue takes part, at its own position in the order.
            if not block.code.startswith(("team", "user")):
                self.positions[queue_key] += 1
                self._push_queue(queue_key)

        # Rewind the queues for the next pass
        for queue_key in visited:
            self.positions[queue_key] = 0
            self._push_queue(queue_key)
        return decision

    def can_any_fit(self) -> bool:
        """Whether the smallest waiting run fits on the device with the most free memory."""
        return bool(self.required_sizes) and self.required_sizes[0] <= self.max_free_bytes

    def start_run(self, waiting_run: WaitingRun, device_id: int, now: float) -> RunningRun:
        """Move a waiting run to a device."""
        running = RunningRun(
            waiting_run.run,
            device_id,
            waiting_run.team,
            waiting_run.user,
            now,
            waiting_run.memory,
            waiting_run.priority,
            now + waiting_run.seconds,
        )
        self.queues[waiting_run.team, waiting_run.user].remove(waiting_run)
        del self.required_sizes[
            bisect.bisect_left(self.required_sizes, self.get_required_bytes(waiting_run))
        ]
        self.add_run(running, since=now)
        # The start counts as usage at once, so that one user cannot start many runs in a pass
        self.charged_seconds[waiting_run.user] += (
            waiting_run.seconds if waiting_run.seconds < math.inf else 3600.0
        )
        if self.devices[device_id].reserved_for == waiting_run.run:
            self.devices[device_id] = replace(self.devices[device_id], reserved_for=None)
            del self.reserved_devices[waiting_run.run]
        self.reindex_device(device_id)
        self._reorder_team(waiting_run.team)
        return running

    def release_run(self, run: int) -> None:
        """Remove a run that has ended."""
        running = self.remove_run(run)
        self._reorder_team(running.team)

    # -- quotas and devices

    def find_quota_block(self, waiting_run: WaitingRun) -> BlockReason | None:
        """The reason why this run may not start even if devices are free, or None."""
        quota, usage = (
            self.pool_state.quota_for(waiting_run.team),
            self.pool_state.usage_for(waiting_run.user),
        )
        team_count = (
            self.team_running[waiting_run.team]
            + self.team_background[waiting_run.team]
            + self.count_reserved(waiting_run, "team")
        )
        user_count = (
            usage.running_elsewhere
            + self.user_running[waiting_run.user]
            + self.count_reserved(waiting_run, "user")
        )
        team_limit, user_limit = quota.limit, usage.max_running
        committed = (
            self.committed_seconds["team", waiting_run.team],
            self.committed_seconds["user", waiting_run.user],
        )
        checks: tuple[tuple[bool, BlockCode, dict[str, int | str]], ...] = (
            (quota.is_on_hold, "team_on_hold", {"team": quota.name}),
            (
                team_limit is not None and team_count >= team_limit,
                "team_limit",
                {"team": quota.name, "running": team_count, "limit": team_limit or 0},
            ),
            (
                quota.seconds_left is not None and quota.seconds_left <= committed[0],
                "team_hours",
                {"team": quota.name},
            ),
            (
                user_limit is not None and user_count >= user_limit,
                "user_limit",
                {"running": user_count, "limit": user_limit or 0},
            ),
            (
                usage.seconds_left is not None and usage.seconds_left <= committed[1],
                "user_hours",
                {},
            ),
            (not waiting_run.is_retry_due, "crash_pause", {}),
        )
        return next(
            (BlockReason(code, details) for is_blocked, code, details in checks if is_blocked), None
        ) or self.find_permanent_block(waiting_run)

    def find_permanent_block(self, waiting_run: WaitingRun) -> BlockReason | None:
        """The reason why this run could not start even in an empty pool, or None."""
        max_bytes = self.pool_state.quota_for(waiting_run.team).max_bytes
        required_bytes = self.get_required_bytes(waiting_run)
        if max_bytes is not None and required_bytes > max_bytes:
            return BlockReason(
                "max_memory", {"required_bytes": required_bytes, "max_bytes": max_bytes}
            )
        if self.pool_state.devices and required_bytes > self.largest_device_bytes:
            return BlockReason(
                "never_fits",
                {
                    "required_bytes": required_bytes,
                    "largest_device_bytes": self.largest_device_bytes,
                },
            )
        return None

    def is_within_guarantee(self, waiting_run: WaitingRun) -> bool:
        """Whether the run would be within its team's guarantee. Background runs never are."""
        team_count = self.team_running[waiting_run.team] + self.count_reserved(waiting_run, "team")
        return (
            waiting_run.priority != "background"
            and team_count < self.pool_state.quota_for(waiting_run.team).guaranteed
        )

    def count_reserved(self, waiting_run: WaitingRun, owner_field: str) -> int:
        """Devices reserved for other waiting runs of the same team or user. They count as used.

        `owner_field` is `team` or `user`.
        """
        owner_id = getattr(waiting_run, owner_field)
        others = (
            self.waiting_runs[run]
            for run in self.reserved_devices
            if run != waiting_run.run and run in self.waiting_runs
        )
        return sum(getattr(other, owner_field) == owner_id for other in others)

    def find_device(self, waiting_run: WaitingRun, now: float) -> int | None:
        """The device with the least free memory on which the run fits (best fit), or None."""
        # A run for which others were evicted waits for that device
        reserved_device_id = self.reserved_devices.get(waiting_run.run)
        if reserved_device_id is not None:
            return (
                reserved_device_id
                if self.devices[reserved_device_id].is_schedulable
                and self.can_fit(waiting_run, reserved_device_id)
                else None
            )
        for _, device_id in self.open_devices[
            bisect.bisect_left(self.open_devices, (self.get_required_bytes(waiting_run), -1)) :
        ]:
            if self.devices[device_id].reserved_for is not None or not self.can_fit(
                waiting_run, device_id
            ):
                continue
            if (
                self.reservation is None
                or self.reservation.device_id != device_id
                or self._can_backfill(self.reservation, waiting_run, now)
            ):
                return device_id
        return None

    def get_required_bytes(self, waiting_run: WaitingRun) -> int:
        """Bytes that the run needs at least. Without a forecast it needs an empty device."""
        return waiting_run.memory if waiting_run.memory is not None else self.smallest_device_bytes

    # -- helpers of the pass

    def _evict_or_reserve(
        self, waiting_run: WaitingRun, now: float, decision: Decision, evict: bool
    ) -> BlockReason:
        """Evict runs for a run that found no device, or reserve a device if it is the first one.

        Returns why the run does not start now.
        """
        # Its device is being freed: the evicted runs are still there, or its memory is checked
        reserved_device_id = self.reserved_devices.get(waiting_run.run)
        if reserved_device_id is not None:
            evicting_runs = ", ".join(
                str(running.run) for running in self.runs_on[reserved_device_id]
            )
            return (
                BlockReason("evicting", {"runs": evicting_runs})
                if evicting_runs
                else BlockReason("checking_device")
            )

        # Runs within their guarantee and urgent runs may evict others
        if evict and (self.is_within_guarantee(waiting_run) or waiting_run.priority == "urgent"):
            eviction_plan = find_victims(self, waiting_run, now)
            if eviction_plan is not None:
                device_id, victims = eviction_plan
                decision.evictions |= {running.run: waiting_run.run for running in victims}
                self.begin_eviction(device_id, victims, waiting_run.run)
                return BlockReason(
                    "evicting", {"runs": ", ".join(str(running.run) for running in victims)}
                )

        # The first run of the pass that finds no device gets the reservation
        if self.reservation is None:
            self.reservation = self._reserve_for_head(waiting_run, now)
        if (
            self.reservation is None
            or self.reservation.waiting_run.run == waiting_run.run
            or self.max_free_bytes < self.get_required_bytes(waiting_run)
        ):
            return BlockReason("full", self.get_capacity_details(waiting_run))
        return BlockReason(
            "reserved",
            {
                **self.get_capacity_details(waiting_run),
                "head_run": self.reservation.waiting_run.run,
            },
        )

    def _release_reservation(self, waiting_run: WaitingRun, decision: Decision) -> None:
        """Let other runs use the device that was reserved for this one."""
        device_id = self.reserved_devices.pop(waiting_run.run, None)
        if device_id is not None:
            self.devices[device_id] = replace(self.devices[device_id], reserved_for=None)
            decision.released_reservations.append(waiting_run.run)

    def _reserve_for_head(self, waiting_run: WaitingRun, now: float) -> Reservation | None:
        """The device on which the run can start first, by the expected ends of the others."""
        best: Reservation | None = None
        for device in self.devices.values():
            if (
                not device.is_schedulable
                or device.reserved_for is not None
                or (waiting_run.memory or 0) > device.free_bytes
            ):
                continue
            available_at = max(now, self.estimate_available_at(waiting_run, device))
            if best is None or available_at < best.available_at:
                best = Reservation(waiting_run, device.id, available_at)
        return best

    def _can_backfill(self, reservation: Reservation, waiting_run: WaitingRun, now: float) -> bool:
        """Whether starting this run on the reserved device would not delay the reservation."""
        head = reservation.waiting_run
        if (
            head.run == waiting_run.run
            or now + waiting_run.seconds <= reservation.available_at < math.inf
        ):
            return True
        ending_runs = [
            running
            for running in self.runs_on[reservation.device_id]
            if running.expected_end <= reservation.available_at
        ]
        return head.memory is not None and self.can_fit(
            waiting_run, reservation.device_id, without=ending_runs, reserved_bytes=head.memory
        )

    def get_sort_key(self, waiting_run: WaitingRun) -> tuple[float, ...]:
        """The sort key of the queue of the pool; the smallest comes first."""
        quota = self.pool_state.quota_for(waiting_run.team)
        over_guarantee = (self.team_running[waiting_run.team] - quota.guaranteed) / quota.weight
        used_seconds = (
            self.pool_state.usage_for(waiting_run.user).decayed_seconds
            + self.charged_seconds[waiting_run.user]
        )
        return (
            not self.is_within_guarantee(waiting_run),
            PRIORITIES.index(waiting_run.priority),
            over_guarantee,
            used_seconds,
            waiting_run.submitted,
            waiting_run.run,
        )

    def _push_queue(self, queue_key: QueueKey) -> None:
        """Put the queue's next run on the heap; older entries of this queue become stale."""
        self.versions[queue_key] += 1
        if self.positions[queue_key] < len(self.queues[queue_key]):
            key = self.get_sort_key(self.queues[queue_key][self.positions[queue_key]])
            heapq.heappush(self.heap, (key, self.versions[queue_key], queue_key))

    def _pop_queue(self) -> QueueKey | None:
        """The queue whose next run comes first, skipping stale entries."""
        while self.heap:
            _, version, queue_key = heapq.heappop(self.heap)
            if version == self.versions[queue_key]:
                return queue_key
        return None

    def _reorder_team(self, team: int) -> None:
        """Sort a team's queues again after its number of running runs has changed."""
        for queue_key in self.team_queues[team]:
            self._push_queue(queue_key)
