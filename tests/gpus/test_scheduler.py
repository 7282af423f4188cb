"""Who starts, who waits and who goes: the policy, on a simulated pool with the true scheduler."""

import math
from dataclasses import replace

from benchmarks.pool_simulator import SimulatedPool
from training.gpus.scheduling import eta
from training.gpus.scheduling.eta import dry_run, estimate_start_ranges
from training.gpus.scheduling.explain import explain_queue, format_block_reason, get_hint
from training.gpus.scheduling.scheduler import Scheduler
from training.gpus.scheduling.state import (
    DeviceState,
    PendingJob,
    PoolState,
    RunningJob,
    TeamQuota,
    UserUsage,
)

GB = 10**9
NLP, VISION = 1, 2


def make_pending(run, team=NLP, user=None, **changes):
    values = {"submitted": float(run), "memory": 20 * GB, "seconds": 1000.0}
    return PendingJob(run, team, user or team, **(values | changes))


def make_pool(devices=4, **choices):
    return SimulatedPool.create_pool(devices, 24 * GB, **choices)


def make_teams(nlp=2, vision=2, **changes):
    return {NLP: TeamQuota("nlp", nlp, **changes), VISION: TeamQuota("vision", vision)}


def explain_run(simulated, run):
    scheduler = Scheduler(simulated.current_state())
    block_reasons = scheduler.admit_jobs(simulated.now).block_reasons
    position, block = explain_queue(scheduler, block_reasons)[run]
    return position, format_block_reason(block, simulated.current_state())


def test_it_works():
    simulated = make_pool(1)
    simulated.submit_run(make_pending(1), 100)
    simulated.submit_run(make_pending(2), 100)
    assert set(simulated.running) == {1} and set(simulated.waiting) == {2}
    simulated.run_until(100)
    assert set(simulated.running) == {2}
    simulated.run_until(200)
    assert simulated.finished == {1: 100, 2: 200}


def test_a_team_borrows_what_is_idle_and_gives_it_back_newest_first():
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


def test_a_run_over_its_guarantee_evicts_nobody():
    simulated = make_pool(2, teams=make_teams(nlp=1, vision=0))
    simulated.submit_run(make_pending(1, VISION), 10_000)
    simulated.submit_run(make_pending(2, VISION), 10_000)
    simulated.run_until(5000)
    simulated.submit_run(make_pending(3, NLP), 10_000)
    simulated.run_until(5100)
    assert 3 in simulated.running
    simulated.submit_run(make_pending(4, NLP), 10_000)
    assert not simulated.evicting


def test_a_run_is_left_alone_for_ten_minutes_and_after_three_stops_a_day():
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


def test_background_goes_first_and_counts_against_no_guarantee():
    simulated = make_pool(2, teams=make_teams(nlp=1, vision=1))
    simulated.submit_run(make_pending(1, NLP, priority="background"), 10_000)
    simulated.submit_run(make_pending(2, NLP), 10_000)
    simulated.run_until(1000)
    simulated.submit_run(make_pending(3, VISION), 100)
    assert set(simulated.evicting) == {1}


def test_urgent_runs_come_first_and_are_left_alone():
    simulated = make_pool(1, teams=make_teams(nlp=0, vision=0))
    simulated.submit_run(make_pending(1), 10_000)
    simulated.run_until(1000)
    simulated.submit_run(make_pending(2, VISION), 10_000)
    simulated.submit_run(make_pending(3, VISION, priority="urgent"), 10_000)
    assert simulated.evicting.keys() == {1}
    simulated.run_until(1100)
    assert 3 in simulated.running


def test_what_was_freed_for_a_run_goes_to_that_run():
    """Two victims that leave at different times; the device of the first is not stolen meanwhile
    (Kueue #13797).
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


def test_a_large_head_is_not_starved_by_small_runs():
    simulated = make_pool(1, runs_per_device=4)
    simulated.submit_run(make_pending(1, memory=5 * GB, seconds=1000), 1000)
    simulated.submit_run(make_pending(2, VISION, memory=None), 100)
    for run in range(3, 60):
        simulated.submit_run(make_pending(run, user=run, memory=5 * GB, seconds=300), 300)
        simulated.run_until(simulated.now + 50)
    started = next(line.started for line in simulated.ledger if line.run == 2)
    assert started == 1000
    early = [line for line in simulated.ledger if line.started < 1000 and line.run > 2]
    # They filled the gap, and delayed nothing
    assert early and all(line.ended <= 1000 for line in early)


def test_two_runs_share_a_device_only_where_both_fit_and_the_pool_allows_it():
    simulated = make_pool(1, runs_per_device=2)
    simulated.submit_run(make_pending(1, memory=12 * GB), 100)
    simulated.submit_run(make_pending(2, memory=13 * GB), 100)
    simulated.submit_run(make_pending(3, user=9, memory=11 * GB), 100)
    assert set(simulated.running) == {1, 3}
    unshared = make_pool(1)
    unshared.submit_run(make_pending(1, memory=1 * GB), 100)
    unshared.submit_run(make_pending(2, memory=1 * GB), 100)
    assert set(unshared.running) == {1}


def test_the_person_who_used_less_comes_first_and_the_entry_is_charged_at_once():
    people = {5: UserUsage(decayed_seconds=10_000.0), 6: UserUsage(decayed_seconds=0.0)}
    devices = [DeviceState(n, 24 * GB) for n in range(3)]
    waiting = [make_pending(run, user=5) for run in (1, 2)] + [
        make_pending(run, user=6, seconds=9000.0) for run in (3, 4, 5)
    ]
    decision = Scheduler(PoolState("p", devices, waiting=waiting, people=people)).admit_jobs(0.0)
    # After two entries of 9,000 s ben has used more than anna
    assert [job.run for job in decision.starts] == [
        3,
        4,
        1,
    ]


def test_own_runs_can_be_moved_up_but_not_before_those_of_others():
    simulated = make_pool(1)
    simulated.submit_run(make_pending(1), 100)
    simulated.submit_run(make_pending(2, VISION, user=7), 100)
    simulated.submit_run(make_pending(3, user=8), 100)
    simulated.submit_run(make_pending(4, user=8, moved_up_at=1.0), 100)
    simulated.run_until(250)
    assert [line.run for line in simulated.ledger] == [1, 2, 4]


def test_limits_hold_and_are_told_with_their_numbers():
    simulated = make_pool(
        4, teams={NLP: TeamQuota("nlp", 1, limit=2)}, people={3: UserUsage(max_running=1)}
    )
    for run in (1, 2, 3):
        simulated.submit_run(make_pending(run), 100)
    simulated.submit_run(make_pending(4, VISION, user=3), 100)
    simulated.submit_run(make_pending(5, VISION, user=3), 100)
    assert set(simulated.running) == {1, 2, 4}
    assert explain_run(simulated, 3)[1] == "team nlp holds 2 of at most 2 devices in simulated."
    assert explain_run(simulated, 5)[1] == "its owner holds 1 of at most 1 devices."


def test_a_budget_counts_what_running_runs_will_still_take():
    simulated = make_pool(4, teams={NLP: TeamQuota("nlp", seconds_left=1500.0)})
    for run in (1, 2, 3):
        simulated.submit_run(make_pending(run), 1000)
    assert set(simulated.running) == {1, 2}
    assert "device-hours" in explain_run(simulated, 3)[1]


def test_the_reason_names_the_numbers_and_the_run_for_which_a_place_is_kept():
    simulated = make_pool(1, teams=make_teams(nlp=1), runs_per_device=2)
    simulated.submit_run(make_pending(1), 1000)
    simulated.submit_run(make_pending(81, VISION, memory=None), 100)
    simulated.submit_run(make_pending(82, user=9, memory=3 * GB, seconds=5000), 100)
    position, head_reason = explain_run(simulated, 81)
    assert (
        position == 1
        and "needs a whole device, and the one device of simulated is in use" in head_reason
    )
    assert "kept for run 81" in explain_run(simulated, 82)[1]


def test_what_can_never_fit_is_told():
    simulated = make_pool(1)
    simulated.submit_run(make_pending(1, memory=30 * GB), 100)
    assert (
        explain_run(simulated, 1)[1]
        == "needs 30.0 GB, and the largest device of simulated has 24.0 GB."
    )


def test_nothing_starts_on_a_device_that_is_gone_or_dirty_or_in_a_pool_on_hold():
    offline = PoolState(
        "p", [DeviceState(0, 24 * GB, is_schedulable=False)], waiting=[make_pending(1)]
    )
    on_hold = PoolState("p", [DeviceState(0, 24 * GB)], waiting=[make_pending(1)], is_on_hold=True)
    for pool_state in (offline, on_hold):
        assert not Scheduler(pool_state).admit_jobs(0.0).starts


def test_the_start_is_told_as_a_range():
    devices = [DeviceState(0, 24 * GB)]
    pool_state = PoolState(
        "p",
        devices,
        [RunningJob(1, 0, NLP, 1, 0.0, 20 * GB, expected_end=1000.0)],
        [make_pending(2), make_pending(3)],
    )
    start_ranges = estimate_start_ranges(pool_state, 400.0)
    assert (start_ranges[2].earliest, start_ranges[2].latest) == (1000, 1300)
    assert (start_ranges[3].earliest, start_ranges[3].latest) == (2000, 2800)
    unknown = PoolState("p", devices, [RunningJob(1, 0, NLP, 1, 0.0, 20 * GB)], [make_pending(2)])
    assert estimate_start_ranges(unknown, 0.0) == {}


def test_a_dry_run_tells_who_would_wait_longer():
    devices = [DeviceState(n, 24 * GB) for n in range(2)]
    before = PoolState("p", devices, waiting=[make_pending(1), make_pending(2)])
    after = PoolState(
        "p",
        devices,
        waiting=[make_pending(1), make_pending(2)],
        teams={NLP: TeamQuota("nlp", limit=1)},
    )
    assert dry_run(before, after, 0.0) == {2: (0.0, 1000.0)}
    assert dry_run(
        before,
        PoolState("p", devices, waiting=[make_pending(1), make_pending(2)], is_on_hold=True),
        0.0,
    ) == {
        1: (0, math.inf),
        2: (0, math.inf),
    }


def test_one_guarantee_makes_room_once_however_many_of_the_team_wait():
    """48 devices asked for, 376 evicted (KAI #1565): what is kept for a team's runs counts as
    held.
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


def test_nobody_starts_on_a_kept_device_that_is_not_good():
    pool_state = PoolState(
        "p",
        [DeviceState(0, 24 * GB, is_schedulable=False, reserved_for=1)],
        waiting=[make_pending(1)],
    )
    decision = Scheduler(pool_state).admit_jobs(0.0)
    assert not decision.starts
    assert (
        format_block_reason(decision.block_reasons[1], pool_state)
        == "starts when the device that was freed for it is seen to be empty."
    )


def test_a_device_is_kept_no_longer_for_a_run_that_may_not_start():
    pool_state = PoolState(
        "p",
        [DeviceState(0, 24 * GB, reserved_for=1)],
        waiting=[make_pending(1), make_pending(2, VISION)],
        teams={NLP: TeamQuota("nlp", is_on_hold=True)},
    )
    decision = Scheduler(pool_state).admit_jobs(0.0)
    assert decision.released_reservations == [1]
    assert [job.run for job in decision.starts] == [2]


def test_a_persons_background_run_does_not_pass_before_anothers_normal_one():
    devices = [DeviceState(0, 80 * GB), DeviceState(1, 24 * GB)]
    waiting = [
        make_pending(1, NLP, user=1, memory=70 * GB),
        make_pending(2, NLP, user=1, memory=10 * GB, priority="background"),
        make_pending(3, NLP, user=2, memory=10 * GB, submitted=9.0),
    ]
    pool_state = PoolState(
        "p", devices, [RunningJob(9, 0, VISION, 9, 0.0, 70 * GB, expected_end=50.0)], waiting
    )
    assert [job.run for job in Scheduler(pool_state).admit_jobs(0.0).starts] == [3]


def test_no_more_leave_a_shared_device_than_must():
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
    block = explain_queue(scheduler, scheduler.admit_jobs(pool_state.now).block_reasons)[run][1]
    return format_block_reason(block, pool_state), get_hint(
        scheduler, scheduler.pending_jobs[run], block
    )


def test_memory_that_other_programs_hold_is_not_given_out_and_is_named():
    pool_state = PoolState(
        "A100",
        [DeviceState(1, 24 * GB, used_by_others=6 * GB)],
        waiting=[PendingJob(1, NLP, 1, 0.0, memory=20 * GB)],
    )
    assert not Scheduler(pool_state).admit_jobs(0.0).starts
    reason, hint = explain_in_state(pool_state, 1)
    assert (
        reason
        == "needs 20.0 GB, and the one device of A100 has too little room: programs that are no "
        "runs hold 6.0 GB."
    )
    assert hint.startswith("What those programs hold, once it is free again")
    assert (
        Scheduler(replace(pool_state, devices=[DeviceState(1, 24 * GB, used_by_others=4 * GB)]))
        .admit_jobs(0.0)
        .starts
    )


def test_a_run_that_waits_for_other_programs_memory_keeps_nobody_else_from_starting():
    waiting = [
        PendingJob(1, NLP, 1, 0.0, memory=20 * GB),
        PendingJob(2, NLP, 2, 1.0, memory=8 * GB),
    ]
    pool_state = PoolState(
        "A100", [DeviceState(1, 24 * GB, used_by_others=10 * GB)], waiting=waiting
    )
    assert [job.run for job in Scheduler(pool_state).admit_jobs(0.0).starts] == [2]


def test_a_run_without_a_forecast_gets_a_device_of_its_own_whatever_else_is_there():
    pool_state = PoolState(
        "A100",
        [DeviceState(1, 24 * GB, used_by_others=10 * GB)],
        waiting=[PendingJob(1, NLP, 1, 0.0)],
    )
    assert [job.run for job in Scheduler(pool_state).admit_jobs(0.0).starts] == [1]


def test_what_is_kept_for_the_head_is_the_reason_only_where_the_run_would_fit():
    running_jobs = [
        RunningJob(8, 1, VISION, 3, 0.0, memory=4 * GB, expected_end=100.0),
        RunningJob(9, 2, VISION, 3, 0.0, memory=18 * GB, expected_end=500.0),
    ]
    waiting = [
        PendingJob(1, NLP, 1, 0.0, memory=24 * GB),
        PendingJob(2, NLP, 2, 1.0, memory=10 * GB, seconds=10_000.0),
        PendingJob(3, NLP, 4, 2.0, memory=22 * GB, seconds=10.0),
    ]
    pool_state = PoolState(
        "A100",
        [
            DeviceState(1, 24 * GB),
            DeviceState(2, 24 * GB),
            DeviceState(3, 24 * GB, is_schedulable=False),
        ],
        running_jobs,
        waiting,
        runs_per_device=2,
    )
    assert explain_in_state(pool_state, 1)[0].startswith(
        "needs 24.0 GB on one of the 2 devices of A100; all of them are in use; 1 more is not"
    )
    assert "is kept for run 1, which comes first" in explain_in_state(pool_state, 2)[0]
    assert explain_in_state(pool_state, 3)[0].startswith(
        "needs 22.0 GB on one of the 2 devices of A100; all of them are in use"
    )
    assert "an admin who makes it urgent" in explain_in_state(pool_state, 2)[1]


def test_a_dry_run_counts_runs_that_make_room():
    running_jobs = [RunningJob(9, 1, VISION, 3, -10_000.0, expected_end=50_000.0)]
    before = PoolState(
        "A100",
        [DeviceState(1, 24 * GB)],
        running_jobs,
        [PendingJob(1, NLP, 1, 0.0, seconds=60.0)],
        teams=make_teams(nlp=0, vision=0),
    )
    after = replace(before, teams=make_teams(nlp=1, vision=0))
    assert eta.dry_run(before, after, 0.0) == {1: (50_000.0, 60.0)}
    assert eta.dry_run(after, replace(after, min_run_seconds=20_000.0), 0.0) == {
        1: (60.0, 50_000.0)
    }
