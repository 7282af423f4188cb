"""Which runs occupy which device and what still fits: the bookkeeping of the scheduler, without
any policy.
"""

from __future__ import annotations

import bisect
import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace

from training.gpus.scheduling.state import DeviceState, PoolState, RunningRun, WaitingRun


class PlacementState:
    """The pool's state while the scheduler tries placements: runs can be added and removed.

    The constructor copies a PoolState, which is not changed.
    """

    def __init__(self, pool_state: PoolState) -> None:
        self.pool_state = pool_state
        self.devices = {device.id: device for device in pool_state.devices}
        self.jobs_on: dict[int, list[RunningRun]] = {device.id: [] for device in pool_state.devices}
        self.running_jobs: dict[int, RunningRun] = {}
        # Runs by team. Only `team_running` counts against the guarantee.
        self.team_running: dict[int, int] = defaultdict(int)
        self.team_background: dict[int, int] = defaultdict(int)
        self.user_running: dict[int, int] = defaultdict(int)
        # Device-seconds that running runs will still use, by ("team" or "user", id)
        self.committed_seconds: dict[tuple[str, int], float] = defaultdict(float)
        # Devices that can take one more run, as sorted pairs (free bytes, device)
        self.open_devices: list[tuple[int, int]] = []
        self.open_entries: dict[int, tuple[int, int]] = {}
        self.available_at_cache: dict[int, dict[int | None, float]] = {}
        schedulable_bytes = [
            device.free_bytes for device in pool_state.devices if device.is_schedulable
        ]
        self.num_schedulable = len(schedulable_bytes)
        self._idle_used_bytes: list[int] | None = None
        self.smallest_device_bytes, self.largest_device_bytes = (
            min(schedulable_bytes, default=0),
            max((device.total_bytes for device in pool_state.devices), default=0),
        )
        self.reserved_devices = {
            device.reserved_for: device.id
            for device in pool_state.devices
            if device.reserved_for is not None
        }
        for job in pool_state.running_jobs:
            self.add_job(job, since=pool_state.now)
        for device in pool_state.devices:
            self.reindex_device(device.id)

    def add_job(self, job: RunningRun, since: float) -> None:
        """Add a run. Its time before `since` is already in the ledger."""
        self.jobs_on[job.device_id].append(job)
        self._idle_used_bytes = None
        self.running_jobs[job.run] = job
        counts = self.team_background if job.priority == "background" else self.team_running
        counts[job.team] += 1
        self.user_running[job.user] += 1
        remaining = job.expected_end - since
        if remaining < math.inf:
            self.committed_seconds["team", job.team] += max(0.0, remaining)
            self.committed_seconds["user", job.user] += max(0.0, remaining)

    def remove_job(self, run: int) -> RunningRun:
        """Remove a run that has left its device."""
        job = self.running_jobs.pop(run)
        self.jobs_on[job.device_id].remove(job)
        self._idle_used_bytes = None
        counts = self.team_background if job.priority == "background" else self.team_running
        counts[job.team] -= 1
        self.user_running[job.user] -= 1
        self.reindex_device(job.device_id)
        return job

    def get_free_bytes(self, device_id: int) -> int:
        """Bytes that no run has reserved. A run without a forecast reserves the whole device."""
        return self.devices[device_id].free_bytes - sum(
            job.memory or self.devices[device_id].total_bytes for job in self.jobs_on[device_id]
        )

    def can_fit(
        self,
        pending: WaitingRun,
        device_id: int,
        *,
        without: Iterable[RunningRun] = (),
        reserved_bytes: int = 0,
    ) -> bool:
        """Return whether the run fits on the device if the runs in `without` leave it and
        `reserved_bytes` stay free.
        """
        excluded = set(without)
        current_jobs = [job for job in self.jobs_on[device_id] if job not in excluded]
        if not current_jobs and not reserved_bytes:
            return pending.memory is None or pending.memory <= self.devices[device_id].free_bytes
        if pending.memory is None or any(job.memory is None for job in current_jobs):
            return False
        used_bytes = sum(job.memory or 0 for job in current_jobs) + reserved_bytes
        return (
            len(current_jobs) + bool(reserved_bytes) < self.pool_state.runs_per_device
            and used_bytes + pending.memory <= self.devices[device_id].free_bytes
        )

    def begin_eviction(
        self, device_id: int, victims: Iterable[RunningRun], reserve_for: int
    ) -> None:
        """Set runs to evicting and reserve their device for another run."""
        victim_set = set(victims)
        self.jobs_on[device_id] = [
            replace(job, is_evicting=True) if job in victim_set else job
            for job in self.jobs_on[device_id]
        ]
        self.running_jobs |= {job.run: job for job in self.jobs_on[device_id]}
        self.devices[device_id] = replace(self.devices[device_id], reserved_for=reserve_for)
        self.reserved_devices[reserve_for] = device_id
        self.reindex_device(device_id)

    def estimate_available_at(self, pending: WaitingRun, device: DeviceState) -> float:
        """When enough runs on the device should have ended for this one to fit. Cached until the
        device changes.
        """
        cached = self.available_at_cache[device.id]
        if pending.memory not in cached:
            cached[pending.memory] = self._compute_available_at(pending, device)
        return cached[pending.memory]

    def _compute_available_at(self, pending: WaitingRun, device: DeviceState) -> float:
        current_jobs = sorted(self.jobs_on[device.id], key=lambda job: job.expected_end)
        if not current_jobs:
            return -math.inf
        if pending.memory is None or self.pool_state.runs_per_device == 1:
            return current_jobs[-1].expected_end
        free_bytes, num_remaining = self.get_free_bytes(device.id), len(current_jobs)
        for job in current_jobs:
            free_bytes, num_remaining = (
                free_bytes + (job.memory or device.total_bytes),
                num_remaining - 1,
            )
            if free_bytes >= pending.memory and num_remaining < self.pool_state.runs_per_device:
                return job.expected_end
        return math.inf

    def get_capacity_details(self, pending: WaitingRun) -> dict[str, float | int | str]:
        """The figures for the message that no device is free (wait_messages.py)."""
        idle_used_bytes = self.get_idle_used_bytes()
        return {
            "required_bytes": pending.memory or 0,
            "devices": self.num_schedulable,
            "idle_devices": len(idle_used_bytes),
            "used_by_others": min(idle_used_bytes, default=0),
            "unavailable_devices": len(self.devices) - self.num_schedulable,
            "team": self.pool_state.quota_for(pending.team).name,
            "team_running": self.team_running[pending.team] + self.team_background[pending.team],
            "guaranteed": self.pool_state.quota_for(pending.team).guaranteed,
        }

    def get_idle_used_bytes(self) -> list[int]:
        """Bytes used by other processes on each device without a run.

        Cached until a run starts or ends, because every block reason needs it.
        """
        if self._idle_used_bytes is None:
            self._idle_used_bytes = [
                device.used_by_others
                for device in self.devices.values()
                if device.is_schedulable and not self.jobs_on[device.id]
            ]
        return self._idle_used_bytes

    def reindex_device(self, device_id: int) -> None:
        """Update the device's entry in `open_devices` after a change."""
        self.available_at_cache[device_id] = {}
        old_entry = self.open_entries.pop(device_id, None)
        if old_entry is not None:
            del self.open_devices[bisect.bisect_left(self.open_devices, old_entry)]
        if self.has_slot(device_id):
            self.open_entries[device_id] = (self.get_free_bytes(device_id), device_id)
            bisect.insort(self.open_devices, self.open_entries[device_id])

    @property
    def max_free_bytes(self) -> int:
        """Free bytes on the device that has the most, -1 if no device can take a run."""
        return self.open_devices[-1][0] if self.open_devices else -1

    def has_slot(self, device_id: int) -> bool:
        """Whether the device could take one more run that is small enough."""
        current_jobs = self.jobs_on[device_id]
        if not self.devices[device_id].is_schedulable:
            return False
        return not current_jobs or (
            len(current_jobs) < self.pool_state.runs_per_device
            and all(job.memory is not None for job in current_jobs)
        )
