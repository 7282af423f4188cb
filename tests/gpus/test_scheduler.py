"""The scheduling policy (starts, waits, evictions) on a simulated pool with the real scheduler."""

import math
from dataclasses import replace
from typing import get_args

from benchmarks.pool_simulator import SimulatedPool
from training.gpus.scheduling import eta
from training.gpus.scheduling.eta import compare_start_times, estimate_start_ranges
from training.gpus.scheduling.scheduler import Scheduler
from training.gpus.scheduling.state import (
    BlockCode,
    BlockReason,
    DeviceState,
    PoolState,
    RunningRun,
    TeamQuota,
    UserUsage,
    WaitingRun,
)
from training.gpus.scheduling.wait_messages import (
    HINTS,
    REASON_MESSAGES,
    explain_queue,
    format_block_reason,
    get_hint,
)

GB = 10**9
NLP, VISION = 1, 2


def make_pending(run, team=NLP, user=None, **changes):
    values = {"submitted": float(run), "memory": 20 * GB, "seconds": 1000.0}
    return WaitingRun(run, team, user or team, **(values | changes))


def make_pool(devices=4, **choices):
    return SimulatedPool.create_pool(devices, 24 * GB, **choices)


def make_teams(nlp=2, vision=2, **changes):
    return {NLP: TeamQuota("nlp", nlp, **changes), VISION: TeamQuota("vision", vision)}


def explain_run(simulated, run):
    """The queue position and block reason of a waiting run."""
    scheduler = Scheduler(simulated.current_state())
    block_reasons = scheduler.admit_runs(simulated.now).block_reasons
    return explain_queue(scheduler, block_reasons)[run]


def test_a_waiting_run_starts_when_the_device_is_free():
    simulated = make_pool(1)
    simulated.submit_run(make_pending(1), 100)
    simulated.submit_run(make_pending(2), 100)
    assert set(simulated.running) == {1} and set(simulated.waiting) == {2}
    simulated.run_until(100)
    assert set(simulated.running) == {2}
    simulated.run_until(200)
    assert simulated.finished == {1: 100, 2: 200}


def test_borrowed_devices_are_returned_by_evicting_the_newest_run():
    simulated = make_pool(4, teams=make_teams())
    for run in range(1, 5):
        simulated.submit_run(make_pending(run), 10_000)
        simulated.run_until(simulated.now + 10)
    assert len(simulated.running) == 4
    simulated.run_until(2000)
    simulated.submit_run(make_pending(9, VISION), 100)
    assert set(simulated.evicting) == {4}
    simulated.run_until(2031)
    assert 9 in simulated.running and 4 in simulated.waiting
    simulated.run_until(2200)
    assert 4 in simulated.running


def test_a_run_beyond_its_guarantee_evicts_no_other_run():
    simulated = make_pool(2, teams=make_teams(nlp=1, vision=0))
    simulated.submit_run(make_pending(1, VISION), 10_000)
    simulated.submit_run(make_pending(2, VISION), 10_000)
    simulated.run_until(5000)
    simulated.submit_run(make_pending(3, NLP), 10_000)
    simulated.run_until(5100)
    assert 3 in simulated.running
    simulated.submit_run(make_pending(4, NLP), 10_000)
    assert not simulated.evicting


def test_runs_are_not_evicted_within_ten_minutes_or_more_than_three_times_a_day():
    simulated = make_pool(1, teams=make_teams(nlp=0, vision=1))
    simulated.submit_run(make_pending(1), 100_000)
    simulated.run_until(599)
    simulated.submit_run(make_pending(10, VISION), 10)
    assert not simulated.evicting
    simulated.run_until(600)
    assert set(simulated.evicting) == {1}
    simulated.run_until(700)
    for number in (11, 12, 13):
        simulated.run_until(simulated.now + 700)
        simulated.submit_run(make_pending(number, VISION), 10)
        simulated.run_until(simulated.now + 100)
    assert len(simulated.running[1][0].evicted_at) == 3
    assert 13 in simulated.waiting


def test_background_runs_are_evicted_first_and_do_not_count_against_the_guarantee():
    simulated = make_pool(2, teams=make_teams(nlp=1, vision=1))
    simulated.submit_run(make_pending(1, NLP, priority="background"), 10_000)
    simulated.submit_run(make_pending(2, NLP), 10_000)
    simulated.run_until(1000)
    simulated.submit_run(make_pending(3, VISION), 100)
    assert set(simulated.evicting) == {1}


def test_urgent_runs_start_first_and_are_never_evicted():
    simulated = make_pool(1, teams=make_teams(nlp=0, vision=0))
    simulated.submit_run(make_pending(1), 10_000)
    simulated.run_until(1000)
    simulated.submit_run(make_pending(2, VISION), 10_000)
    simulated.submit_run(make_pending(3, VISION, priority="urgent"), 10_000)
    assert simulated.evicting.keys() == {1}
    simulated.run_until(1100)
    assert 3 in simulated.running


def test_a_freed_device_goes_to_the_run_that_it_was_freed_for():
    """Two victims leave at different times, and no other run takes the free part of the device
    meanwhile (Kueue #13797).
    """
    simulated = make_pool(1, teams=make_teams(nlp=0, vision=1), runs_per_device=2)
    simulated.submit_run(make_pending(1, memory=10 * GB), 10_000)
    simulated.submit_run(make_pending(2, memory=10 * GB), 10_000)
    simulated.run_until(1000)
    simulated.submit_run(make_pending(3, VISION), 100)
    assert set(simulated.evicting) == {1, 2}
    simulated.end_run(1)
    simulated.submit_run(make_pending(4, memory=10 * GB), 100)
    assert 4 in simulated.waiting and 3 in simulated.waiting
    simulated.run_until(1040)
    assert 3 in simulated.running


def test_small_runs_do_not_starve_a_large_run():
    simulated = make_pool(1, runs_per_device=4)
    simulated.submit_run(make_pending(1, memory=5 * GB, seconds=1000), 1000)
    simulated.submit_run(make_pending(2, VISION, memory=None), 100)
    for run in range(3, 60):
        simulated.submit_run(make_pending(run, user=run, memory=5 * GB, seconds=300), 300)
        simulated.run_until(simulated.now + 50)
    started = next(line.started for line in simulated.ledger if line.run == 2)
    assert started == 1000
    early = [line for line in simulated.ledger if line.started < 1000 and line.run > 2]
    # Small runs filled the gap and did not delay the large one
    assert early and all(line.ended <= 1000 for line in early)


def test_two_runs_share_a_device_only_if_both_fit_and_the_pool_allows_it():
    simulated = make_pool(1, runs_per_device=2)
    simulated.submit_run(make_pending(1, memory=12 * GB), 100)
    simulated.submit_run(make_pending(2, memory=13 * GB), 100)
    simulated.submit_run(make_pending(3, user=9, memory=11 * GB), 100)
    assert set(simulated.running) == {1, 3}
    unshared = make_pool(1)
    unshared.submit_run(make_pending(1, memory=1 * GB), 100)
    unshared.submit_run(make_pending(2, memory=1 * GB), 100)
    assert set(unshared.running) == {1}


def test_the_user_with_less_usage_comes_first_and_a_start_counts_at_once():
    people = {5: UserUsage(decayed_seconds=10_000.0), 6: UserUsage(decayed_seconds=0.0)}
    devices = [DeviceState(n, 24 * GB) for n in range(3)]
    waiting = [make_pending(run, user=5) for run in (1, 2)] + [
        make_pending(run, user=6, seconds=9000.0) for run in (3, 4, 5)
    ]
    decision = Scheduler(PoolState("p", devices, waiting=waiting, users=people)).admit_runs(0.0)
    # After two starts of 9,000 s user 6 has used more than user 5
    assert [started_run.run for started_run in decision.starts] == [
        3,
        4,
        1,
    ]


def test_moving_a_run_up_does_not_pass_the_runs_of_others():
    simulated = make_pool(1)
    simulated.submit_run(make_pending(1), 100)
    simulated.submit_run(make_pending(2, VISION, user=7), 100)
    simulated.submit_run(make_pending(3, user=8), 100)
    simulated.submit_run(make_pending(4, user=8, moved_up_at=1.0), 100)
    simulated.run_until(250)
    assert [line.run for line in simulated.ledger] == [1, 2, 4]


def test_limits_apply_and_the_block_reason_has_their_figures():
    simulated = make_pool(
        4, teams={NLP: TeamQuota("nlp", 1, limit=2)}, users={3: UserUsage(max_running=1)}
    )
    for run in (1, 2, 3):
        simulated.submit_run(make_pending(run), 100)
    simulated.submit_run(make_pending(4, VISION, user=3), 100)
    simulated.submit_run(make_pending(5, VISION, user=3), 100)
    assert set(simulated.running) == {1, 2, 4}
    block = explain_run(simulated, 3)[1]
    assert (block.code, block.details) == (
        "team_limit",
        {"team": "nlp", "running": 2, "limit": 2},
    )
    block = explain_run(simulated, 5)[1]
    assert (block.code, block.details) == ("user_limit", {"running": 1, "limit": 1})


def test_a_budget_includes_the_remaining_time_of_running_runs():
    simulated = make_pool(4, teams={NLP: TeamQuota("nlp", seconds_left=1500.0)})
    for run in (1, 2, 3):
        simulated.submit_run(make_pending(run), 1000)
    assert set(simulated.running) == {1, 2}
    assert explain_run(simulated, 3)[1].code == "team_hours"


def test_the_block_reason_names_the_run_that_has_the_reservation():
    simulated = make_pool(1, teams=make_teams(nlp=1), runs_per_device=2)
    simulated.submit_run(make_pending(1), 1000)
    simulated.submit_run(make_pending(81, VISION, memory=None), 100)
    simulated.submit_run(make_pending(82, user=9, memory=3 * GB, seconds=5000), 100)
    position, block = explain_run(simulated, 81)
    assert (position, block.code) == (1, "full")
    assert (block.details["required_bytes"], block.details["devices"]) == (0, 1)
    assert block.details["idle_devices"] == 0
    block = explain_run(simulated, 82)[1]
    assert (block.code, block.details["head_run"]) == ("reserved", 81)


def test_a_run_that_can_never_fit_gets_the_sizes_as_reason():
    simulated = make_pool(1)
    simulated.submit_run(make_pending(1, memory=30 * GB), 100)
    block = explain_run(simulated, 1)[1]
    assert block.code == "never_fits"
    assert block.details == {"required_bytes": 30 * GB, "largest_device_bytes": 24 * GB}


def test_nothing_starts_on_an_unavailable_device_or_in_a_pool_on_hold():
    offline = PoolState(
        "p", [DeviceState(0, 24 * GB, is_schedulable=False)], waiting=[make_pending(1)]
    )
    on_hold = PoolState("p", [DeviceState(0, 24 * GB)], waiting=[make_pending(1)], is_on_hold=True)
    for pool_state in (offline, on_hold):
        assert not Scheduler(pool_state).admit_runs(0.0).starts


def test_the_estimated_start_is_a_range():
    devices = [DeviceState(0, 24 * GB)]
    pool_state = PoolState(
        "p",
        devices,
        [RunningRun(1, 0, NLP, 1, 0.0, 20 * GB, expected_end=1000.0)],
        [make_pending(2), make_pending(3)],
    )
    start_ranges = estimate_start_ranges(pool_state, 400.0)
    assert (start_ranges[2].earliest, start_ranges[2].latest) == (1000, 1300)
    assert (start_ranges[3].earliest, start_ranges[3].latest) == (2000, 2800)
    unknown = PoolState("p", devices, [RunningRun(1, 0, NLP, 1, 0.0, 20 * GB)], [make_pending(2)])
    assert estimate_start_ranges(unknown, 0.0) == {}


def test_a_dry_run_lists_the_runs_that_would_wait_longer():
    devices = [DeviceState(n, 24 * GB) for n in range(2)]
    before = PoolState("p", devices, waiting=[make_pending(1), make_pending(2)])
    after = PoolState(
        "p",
        devices,
        waiting=[make_pending(1), make_pending(2)],
        teams={NLP: TeamQuota("nlp", limit=1)},
    )
    assert compare_start_times(before, after, 0.0) == {2: (0.0, 1000.0)}
    assert compare_start_times(
        before,
        PoolState("p", devices, waiting=[make_pending(1), make_pending(2)], is_on_hold=True),
        0.0,
    ) == {
        1: (0, math.inf),
        2: (0, math.inf),
    }


def test_one_guaranteed_device_causes_one_eviction_for_any_number_of_waiting_runs():
    """48 devices were requested and 376 runs evicted (KAI #1565). Reserved devices must count as
    used.
    """
    simulated = make_pool(6, teams={NLP: TeamQuota("nlp", 1, limit=1), VISION: TeamQuota("vision")})
    for run in range(1, 7):
        simulated.submit_run(make_pending(run, VISION), 100_000)
    simulated.run_until(2000)
    for run in range(10, 15):
        simulated.submit_run(make_pending(run, NLP), 1000)
    assert len(simulated.evicting) == 1
    simulated.run_until(2100)
    assert len(simulated.running) == 6
    assert sum(device.reserved_for is not None for device in simulated.devices.values()) == 0


def test_no_run_starts_on_its_reserved_device_while_that_is_unavailable():
    pool_state = PoolState(
        "p",
        [DeviceState(0, 24 * GB, is_schedulable=False, reserved_for=1)],
        waiting=[make_pending(1)],
    )
    decision = Scheduler(pool_state).admit_runs(0.0)
    assert not decision.starts
    assert decision.block_reasons[1].code == "checking_device"


def test_the_reservation_of_a_blocked_run_is_released():
    pool_state = PoolState(
        "p",
        [DeviceState(0, 24 * GB, reserved_for=1)],
        waiting=[make_pending(1), make_pending(2, VISION)],
        teams={NLP: TeamQuota("nlp", is_on_hold=True)},
    )
    decision = Scheduler(pool_state).admit_runs(0.0)
    assert decision.released_reservations == [1]
    assert [started_run.run for started_run in decision.starts] == [2]


def test_a_background_run_does_not_pass_the_normal_run_of_another_user():
    devices = [DeviceState(0, 80 * GB), DeviceState(1, 24 * GB)]
    waiting = [
        make_pending(1, NLP, user=1, memory=70 * GB),
        make_pending(2, NLP, user=1, memory=10 * GB, priority="background"),
        make_pending(3, NLP, user=2, memory=10 * GB, submitted=9.0),
    ]
    pool_state = PoolState(
        "p", devices, [RunningRun(9, 0, VISION, 9, 0.0, 70 * GB, expected_end=50.0)], waiting
    )
    assert [started_run.run for started_run in Scheduler(pool_state).admit_runs(0.0).starts] == [3]


def test_only_the_necessary_runs_are_evicted_from_a_shared_device():
    simulated = SimulatedPool.create_pool(
        1, 100 * GB, runs_per_device=3, teams=make_teams(nlp=0, vision=1)
    )
    simulated.submit_run(make_pending(1, memory=80 * GB), 10_000)
    simulated.run_until(10)
    simulated.submit_run(make_pending(2, memory=10 * GB), 10_000)
    simulated.run_until(1000)
    simulated.submit_run(make_pending(3, VISION, memory=80 * GB), 100)
    assert set(simulated.evicting) == {1}


def explain_in_state(pool_state, run):
    scheduler = Scheduler(pool_state)
    block = explain_queue(scheduler, scheduler.admit_runs(pool_state.now).block_reasons)[run][1]
    return block, get_hint(scheduler, scheduler.waiting_runs[run], block)


def test_memory_used_by_other_processes_is_not_available_and_is_the_reason():
    pool_state = PoolState(
        "A100",
        [DeviceState(1, 24 * GB, used_by_others=6 * GB)],
        waiting=[WaitingRun(1, NLP, 1, 0.0, memory=20 * GB)],
    )
    assert not Scheduler(pool_state).admit_runs(0.0).starts
    block, hint = explain_in_state(pool_state, 1)
    assert (block.code, block.details["used_by_others"]) == ("full", 6 * GB)
    assert "other processes" in hint
    assert format_block_reason(block, pool_state) == (
        "needs 20.0 GB, but the only device of A100 has too little free memory (6.0 GB used by "
        "other processes)."
    )
    assert (
        Scheduler(replace(pool_state, devices=[DeviceState(1, 24 * GB, used_by_others=4 * GB)]))
        .admit_runs(0.0)
        .starts
    )


def test_a_run_that_waits_for_memory_of_other_processes_does_not_block_others():
    waiting = [
        WaitingRun(1, NLP, 1, 0.0, memory=20 * GB),
        WaitingRun(2, NLP, 2, 1.0, memory=8 * GB),
    ]
    pool_state = PoolState(
        "A100", [DeviceState(1, 24 * GB, used_by_others=10 * GB)], waiting=waiting
    )
    assert [started_run.run for started_run in Scheduler(pool_state).admit_runs(0.0).starts] == [2]


def test_a_run_without_a_forecast_gets_a_whole_device_despite_other_processes():
    pool_state = PoolState(
        "A100",
        [DeviceState(1, 24 * GB, used_by_others=10 * GB)],
        waiting=[WaitingRun(1, NLP, 1, 0.0)],
    )
    assert [started_run.run for started_run in Scheduler(pool_state).admit_runs(0.0).starts] == [1]


def test_a_reservation_is_the_reason_only_if_the_run_would_fit():
    running = [
        RunningRun(8, 1, VISION, 3, 0.0, memory=4 * GB, expected_end=100.0),
        RunningRun(9, 2, VISION, 3, 0.0, memory=18 * GB, expected_end=500.0),
    ]
    waiting = [
        WaitingRun(1, NLP, 1, 0.0, memory=24 * GB),
        WaitingRun(2, NLP, 2, 1.0, memory=10 * GB, seconds=10_000.0),
        WaitingRun(3, NLP, 4, 2.0, memory=22 * GB, seconds=10.0),
    ]
    pool_state = PoolState(
        "A100",
        [
            DeviceState(1, 24 * GB),
            DeviceState(2, 24 * GB),
            DeviceState(3, 24 * GB, is_schedulable=False),
        ],
        running,
        waiting,
        runs_per_device=2,
    )
    for run, required in ((1, 24 * GB), (3, 22 * GB)):
        block = explain_in_state(pool_state, run)[0]
        assert (block.code, block.details["required_bytes"]) == ("full", required)
        assert (block.details["devices"], block.details["idle_devices"]) == (2, 0)
        assert block.details["unavailable_devices"] == 1
    block, hint = explain_in_state(pool_state, 2)
    assert (block.code, block.details["head_run"]) == ("reserved", 1)
    assert "urgent" in hint


def test_every_block_reason_has_a_message():
    details = {"team": "nlp", "runs": "1", "team_running": 1, "running": 1, "limit": 2}
    details |= {"guaranteed": 1, "head_run": 1, "ahead": 3, "devices": 2, "idle_devices": 1}
    details |= {"required_bytes": GB, "max_bytes": GB, "largest_device_bytes": GB}
    details |= {"used_by_others": GB, "unavailable_devices": 2}
    for code in REASON_MESSAGES:
        message = format_block_reason(BlockReason(code, details), PoolState("A100", []))
        assert message.endswith("."), code
    assert set(REASON_MESSAGES) == set(get_args(BlockCode))
    assert set(HINTS) <= set(REASON_MESSAGES)


def test_the_message_of_a_full_pool_agrees_in_number():
    details = {"required_bytes": 30 * GB, "devices": 3, "idle_devices": 1, "used_by_others": 0}
    details |= {"unavailable_devices": 1, "team": "nlp", "team_running": 1, "guaranteed": 2}
    message = format_block_reason(BlockReason("full", details), PoolState("A100", []))
    assert message == (
        "needs 30.0 GB on one of the 3 devices of A100; the idle one has too little free memory; "
        "1 more is unavailable; team nlp uses 1 device and is guaranteed 2."
    )


def test_a_device_that_is_being_checked_is_not_reported_as_offline():
    pool_state = PoolState(
        "A100",
        [DeviceState(1, 24 * GB, is_schedulable=False)],
        waiting=[make_pending(1)],
    )
    block, _ = explain_in_state(pool_state, 1)
    assert block.code == "no_devices"
    assert "being checked" in format_block_reason(block, pool_state)


def test_a_dry_run_simulates_evictions():
    running = [RunningRun(9, 1, VISION, 3, -10_000.0, expected_end=50_000.0)]
    before = PoolState(
        "A100",
        [DeviceState(1, 24 * GB)],
        running,
        [WaitingRun(1, NLP, 1, 0.0, seconds=60.0)],
        teams=make_teams(nlp=0, vision=0),
    )
    after = replace(before, teams=make_teams(nlp=1, vision=0))
    assert eta.compare_start_times(before, after, 0.0) == {1: (50_000.0, 60.0)}
    assert eta.compare_start_times(after, replace(after, min_run_seconds=20_000.0), 0.0) == {
        1: (60.0, 50_000.0)
    }
