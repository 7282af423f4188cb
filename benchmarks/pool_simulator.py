"""A simulated device pool ("4 x 24 GB") with its own clock and the real scheduler, for tests and
for trying out policies. It never replaces real devices.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from training.gpus.scheduling.scheduler import Scheduler
from training.gpus.scheduling.state import (
    MAX_EVICTIONS_PER_DAY,
    Decision,
    DeviceState,
    PoolState,
    RunningRun,
    WaitingRun,
)

EVICTION_GRACE_SECONDS = 30.0  # From an eviction request to the end of the process
DAY_SECONDS = 86_400.0


@dataclass
class Interval:
    """A run's use of a device. Times are seconds of the simulated clock."""

    run: int
    device: int
    team: int
    started: float
    ended: float = math.inf


@dataclass
class SimulatedRun:
    """A run and its remaining work. The scheduler knows only the estimate in `request`."""

    request: WaitingRun
    remaining_seconds: float
    evicted_at: list[float] = field(default_factory=list)


class SimulatedPool:
    """Places runs on simulated devices: submit, advance the clock, end, cancel."""

    def __init__(self, state: PoolState, now: float = 0.0) -> None:
        self.state = replace(state, running=(), waiting=())
        self.devices = {device.id: device for device in state.devices}
        self.now = now
        self.waiting: dict[int, SimulatedRun] = {}
        self.running: dict[int, tuple[SimulatedRun, RunningRun]] = {}
        self.evicting: dict[int, float] = {}  # Run -> end time
        self.ledger: list[Interval] = []
        self.finished: dict[int, float] = {}

    @classmethod
    def create_pool(cls, count: int, memory: int, **choices: object) -> SimulatedPool:
        """For example `SimulatedPool.create_pool(4, 24_000_000_000)`."""
        devices = [DeviceState(number, memory) for number in range(count)]
        return cls(PoolState("simulated", devices, **choices))  # type: ignore[arg-type]

    def submit_run(self, request: WaitingRun, seconds: float) -> None:
        self.waiting[request.run] = SimulatedRun(replace(request, submitted=self.now), seconds)
        self.run_admission()

    def run_admission(self) -> Decision:
        """Run one admission pass and apply its decision."""
        decision = Scheduler(self.current_state()).admit_runs(self.now)
        for running_run in decision.starts:
            simulated_run = self.waiting.pop(running_run.run)
            self.running[running_run.run] = (simulated_run, running_run)
            self.ledger.append(
                Interval(running_run.run, running_run.device_id, running_run.team, self.now)
            )
            if self.devices[running_run.device_id].reserved_for == running_run.run:
                self.devices[running_run.device_id] = replace(
                    self.devices[running_run.device_id], reserved_for=None
                )
        for run in decision.released_reservations:
            self.clear_reservations(run)
        for victim, preemptor in decision.evictions.items():
            simulated_run, running_run = self.running[victim]
            simulated_run.evicted_at.append(self.now)
            self.evicting[victim] = self.now + EVICTION_GRACE_SECONDS
            self.devices[running_run.device_id] = replace(
                self.devices[running_run.device_id], reserved_for=preemptor
            )
        return decision

    def current_state(self) -> PoolState:
        return replace(
            self.state,
            devices=list(self.devices.values()),
            running=[
                replace(
                    running_run,
                    is_evicting=run in self.evicting,
                    expected_end=self.evicting.get(run, running_run.expected_end),
                    is_protected=sum(at > self.now - DAY_SECONDS for at in simulated_run.evicted_at)
                    >= MAX_EVICTIONS_PER_DAY,
                )
                for run, (simulated_run, running_run) in self.running.items()
            ],
            waiting=[simulated_run.request for simulated_run in self.waiting.values()],
        )

    def run_until(self, until: float) -> None:
        """Advance the clock from one end to the next, with an admission pass after each."""
        while True:
            ends = {
                run: min(
                    running_run.started + simulated_run.remaining_seconds,
                    self.evicting.get(run, math.inf),
                )
                for run, (simulated_run, running_run) in self.running.items()
            }
            next_run = min(ends, key=lambda run: (ends[run], run), default=None)
            if next_run is None or ends[next_run] > until:
                self.now = max(self.now, until)
                self.run_admission()
                return
            self.now = max(self.now, ends[next_run])
            self.end_run(next_run)

    def end_run(self, run: int, *, has_crashed: bool = False) -> None:
        """End a run now. It has finished, or it was evicted or has crashed and is queued again."""
        simulated_run, running_run = self.running.pop(run)
        next(
            line for line in self.ledger if line.run == run and line.ended == math.inf
        ).ended = self.now
        simulated_run.remaining_seconds -= self.now - running_run.started
        is_evicted = self.evicting.pop(run, None) is not None
        if simulated_run.remaining_seconds > 1e-9 and (is_evicted or has_crashed):
            self.waiting[run] = simulated_run
        else:
            self.finished[run] = self.now
        self.run_admission()

    def cancel_run(self, run: int) -> None:
        """Cancel a waiting run and clear its reservations."""
        self.waiting.pop(run)
        self.clear_reservations(run)
        self.run_admission()

    def clear_reservations(self, run: int) -> None:
        """Remove the reservations of a run."""
        self.devices = {
            number: replace(card, reserved_for=None) if card.reserved_for == run else card
            for number, card in self.devices.items()
        }
