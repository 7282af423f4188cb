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
        self.runs_on: dict[int, list[RunningRun]] = {device.id: [] for device in pool_state.devices}
        self.running: dict[int, RunningRun] = {}
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
        for running in pool_state.running:
            self.add_run(running, since=pool_state.now)
        for device in pool_state.devices:
            self.reindex_device(device.id)

    def add_run(self, running: RunningRun, since: float) -> None:
        """Add a run. Its time before `since` is already in the ledger."""
        self.runs_on[running.device_id].append(running)
        self._idle_used_bytes = None
        self.running[running.run] = running
        counts = self.team_background if running.priority == "background" else self.team_running
        counts[running.team] += 1
        self.user_running[running.user] += 1
        remaining = running.expected_end - since
        if remaining < math.inf:
            self.committed_seconds["team", running.team] += max(0.0, remaining)
            self.committed_seconds["user", running.user] += max(0.0, remaining)

    def remove_run(self, run: int) -> RunningRun:
        """Remove a run that has left its device."""
        running = self.running.pop(run)
        self.runs_on[running.device_id].remove(running)
        self._idle_used_bytes = None
        counts = self.team_background if running.priority == "background" else self.team_running
        counts[running.team] -= 1
        self.user_running[running.user] -= 1
        self.reindex_device(running.device_id)
        return running

    def get_free_bytes(self, device_id: int) -> int:
        """Bytes that no run has reserved. A run without a forecast reserves the whole device."""
        return self.devices[device_id].free_bytes - sum(
            running.memory or self.devices[device_id].total_bytes
            for running in self.runs_on[device_id]
        )

    def can_fit(
        self,
        waiting_run: WaitingRun,
        device_id: int,
        *,
        without: Iterable[RunningRun] = (),
        reserved_bytes: int = 0,
    ) -> bool:
        """Return whether the run fits on the device if the runs in `without` leave it and
        `reserved_bytes` stay free.
        """
        excluded = set(without)
        current_runs = [running for running in self.runs_on[device_id] if running not in excluded]
        if not current_runs and not reserved_bytes:
            return (
                waiting_run.memory is None
                or waiting_run.memory <= self.devices[device_id].free_bytes
            )
        if waiting_run.memory is None or any(running.memory is None for running in current_runs):
            return False
        used_bytes = sum(running.memory or 0 for running in current_runs) + reserved_bytes
        return (
            len(current_runs) + bool(reserved_bytes) < self.pool_state.runs_per_device
            and used_bytes + waiting_run.memory <= self.devices[device_id].free_bytes
        )

    def begin_eviction(
        self, device_id: int, victims: Iterable[RunningRun], reserve_for: int
    ) -> None:
        """Set runs to evicting and reserve their device for another run."""
        victim_set = set(victims)
        self.runs_on[device_id] = [
            replace(running, is_evicting=True) if running in victim_set else running
            for running in self.runs_on[device_id]
        ]
        self.running |= {running.run: running for running in self.runs_on[device_id]}
        self.devices[device_id] = replace(self.devices[device_id], reserved_for=reserve_for)
        self.reserved_devices[reserve_for] = device_id
        self.reindex_device(device_id)

    def estimate_available_at(self, waiting_run: WaitingRun, device: DeviceState) -> float:
        """When enough runs on the device should have ended for this one to fit. Cached until the
        device changes.
        """
        cached = self.available_at_cache[device.id]
        if waiting_run.memory not in cached:
            cached[waiting_run.memory] = self._compute_available_at(waiting_run, device)
        return cached[waiting_run.memory]

    def _compute_available_at(self, waiting_run: WaitingRun, device: DeviceState) -> float:
        current_runs = sorted(self.runs_on[device.id], key=lambda running: running.expected_end)
        if not current_runs:
            return -math.inf
        if waiting_run.memory is None or self.pool_state.runs_per_device == 1:
            return current_runs[-1].expected_end
        free_bytes, num_remaining = self.get_free_bytes(device.id), len(current_runs)
        for running in current_runs:
            free_bytes, num_remaining = (
                free_bytes + (running.memory or device.total_bytes),
                num_remaining - 1,
            )
            if free_bytes >= waiting_run.memory and num_remaining < self.pool_state.runs_per_device:
                return running.expected_end
        return math.inf

    def get_capacity_details(self, waiting_run: WaitingRun) -> dict[str, float | int | str]:
        """The figures for the message that no device is free (wait_messages.py)."""
        idle_used_bytes = self.get_idle_used_bytes()
        return {
            "required_bytes": waiting_run.memory or 0,
            "devices": self.num_schedulable,
            "idle_devices": len(idle_used_bytes),
            "used_by_others": min(idle_used_bytes, default=0),
            "unavailable_devices": len(self.devices) - self.num_schedulable,
            "team": self.pool_state.quota_for(waiting_run.team).name,
            "team_running": self.team_running[waiting_run.team]
            + self.team_background[waiting_run.team],
            "guaranteed": self.pool_state.quota_for(waiting_run.team).guaranteed,
        }

    def get_idle_used_bytes(self) -> list[int]:
        """Bytes used by other processes on each device without a run.

        Cached until a run starts or ends, because every block reason needs it.
        """
        if self._idle_used_bytes is None:
            self._idle_used_bytes = [
                device.used_by_others
                for device in self.devices.values()
                if device.is_schedulable and not self.runs_on[device.id]
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
        current_runs = self.runs_on[device_id]
        if not self.devices[device_id].is_schedulable:
            return False
        return not current_runs or (
            len(current_runs) < self.pool_state.runs_per_device
            and all(running.memory is not None for running in current_runs)
        )
