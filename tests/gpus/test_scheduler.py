"""Who starts, who waits and who goes: the policy, on a simulated pool with the true scheduler."""

import math
from dataclasses import replace

from benchmarks.pool_simulator import SimulatedPool
from training.gpus.scheduling import eta
from training.gpus.scheduling.eta import dry_run, ranges
from training.gpus.scheduling.explain import barriers, sooner, words
from training.gpus.scheduling.scheduler import Scheduler
from training.gpus.scheduling.state import Card, Holding, Person, Request, Scene, Share

GB = 10**9
NLP, VISION = 1, 2


def ask(run, team=NLP, user=None, **changes):
    values = {"submitted": float(run), "memory": 20 * GB, "seconds": 1000.0}
    return Request(run, team, user or team, **(values | changes))


def pool(cards=4, **choices):
    return SimulatedPool.create_pool(cards, 24 * GB, **choices)


def teams(nlp=2, vision=2, **changes):
    return {NLP: Share("nlp", nlp, **changes), VISION: Share("vision", vision)}


def reason(made, run):
    scheduler = Scheduler(made.current_state())
    found = scheduler.admit(made.now).barriers
    place, barrier = barriers(scheduler, found)[run]
    return place, words(barrier, made.current_state())


def test_it_works():
    made = pool(1)
    made.submit_run(ask(1), 100)
    made.submit_run(ask(2), 100)
    assert set(made.running) == {1} and set(made.waiting) == {2}
    made.run_until(100)
    assert set(made.running) == {2}
    made.run_until(200)
    assert made.finished == {1: 100, 2: 200}


def test_a_team_borrows_what_is_idle_and_gives_it_back_newest_first():
    made = pool(4, teams=teams())
    for run in range(1, 5):
        made.submit_run(ask(run), 10_000)
        made.run_until(made.now + 10)
    assert len(made.running) == 4
    made.run_until(2000)
    made.submit_run(ask(9, VISION), 100)
    assert set(made.evicting) == {4}
    made.run_until(2031)
    assert 9 in made.running and 4 in made.waiting
    made.run_until(2200)
    assert 4 in made.running


def test_a_run_over_its_guarantee_evicts_nobody():
    made = pool(2, teams=teams(nlp=1, vision=0))
    made.submit_run(ask(1, VISION), 10_000)
    made.submit_run(ask(2, VISION), 10_000)
    made.run_until(5000)
    made.submit_run(ask(3, NLP), 10_000)
    made.run_until(5100)
    assert 3 in made.running
    made.submit_run(ask(4, NLP), 10_000)
    assert not made.evicting


def test_a_run_is_left_alone_for_ten_minutes_and_after_three_stops_a_day():
    made = pool(1, teams=teams(nlp=0, vision=1))
    made.submit_run(ask(1), 100_000)
    made.run_until(599)
    made.submit_run(ask(10, VISION), 10)
    assert not made.evicting
    made.run_until(600)
    assert set(made.evicting) == {1}
    made.run_until(700)
    for number in (11, 12, 13):
        made.run_until(made.now + 700)
        made.submit_run(ask(number, VISION), 10)
        made.run_until(made.now + 100)
    assert len(made.running[1][0].evicted_at) == 3
    assert 13 in made.waiting


def test_background_goes_first_and_counts_against_no_guarantee():
    made = pool(2, teams=teams(nlp=1, vision=1))
    made.submit_run(ask(1, NLP, priority="background"), 10_000)
    made.submit_run(ask(2, NLP), 10_000)
    made.run_until(1000)
    made.submit_run(ask(3, VISION), 100)
    assert set(made.evicting) == {1}


def test_urgent_runs_come_first_and_are_left_alone():
    made = pool(1, teams=teams(nlp=0, vision=0))
    made.submit_run(ask(1), 10_000)
    made.run_until(1000)
    made.submit_run(ask(2, VISION), 10_000)
    made.submit_run(ask(3, VISION, priority="urgent"), 10_000)
    assert made.evicting.keys() == {1}
    made.run_until(1100)
    assert 3 in made.running


def test_what_was_freed_for_a_run_goes_to_that_run():
    """Two victims that leave at different times; the device of the first is not stolen meanwhile
    (Kueue #13797).
    """
    made = pool(1, teams=teams(nlp=0, vision=1), most_a_card=2)
    made.submit_run(ask(1, memory=10 * GB), 10_000)
    made.submit_run(ask(2, memory=10 * GB), 10_000)
    made.run_until(1000)
    made.submit_run(ask(3, VISION), 100)
    assert set(made.evicting) == {1, 2}
    made.end_run(1)
    made.submit_run(ask(4, memory=10 * GB), 100)
    assert 4 in made.waiting and 3 in made.waiting
    made.run_until(1040)
    assert 3 in made.running


def test_a_large_head_is_not_starved_by_small_runs():
    made = pool(1, most_a_card=4)
    made.submit_run(ask(1, memory=5 * GB, seconds=1000), 1000)
    made.submit_run(ask(2, VISION, memory=None), 100)
    for run in range(3, 60):
        made.submit_run(ask(run, user=run, memory=5 * GB, seconds=300), 300)
        made.run_until(made.now + 50)
    started = next(line.started for line in made.ledger if line.run == 2)
    assert started == 1000
    early = [line for line in made.ledger if line.started < 1000 and line.run > 2]
    # They filled the gap, and delayed nothing
    assert early and all(line.ended <= 1000 for line in early)


def test_two_runs_share_a_device_only_where_both_fit_and_the_pool_allows_it():
    made = pool(1, most_a_card=2)
    made.submit_run(ask(1, memory=12 * GB), 100)
    made.submit_run(ask(2, memory=13 * GB), 100)
    made.submit_run(ask(3, user=9, memory=11 * GB), 100)
    assert set(made.running) == {1, 3}
    alone = pool(1)
    alone.submit_run(ask(1, memory=1 * GB), 100)
    alone.submit_run(ask(2, memory=1 * GB), 100)
    assert set(alone.running) == {1}


def test_the_person_who_used_less_comes_first_and_the_entry_is_charged_at_once():
    people = {5: Person(used=10_000.0), 6: Person(used=0.0)}
    cards = [Card(n, 24 * GB) for n in range(3)]
    waiting = [ask(run, user=5) for run in (1, 2)] + [
        ask(run, user=6, seconds=9000.0) for run in (3, 4, 5)
    ]
    made = Scheduler(Scene("p", cards, waiting=waiting, people=people)).admit(0.0)
    # After two entries of 9,000 s ben has used more than anna
    assert [held.run for held in made.starts] == [
        3,
        4,
        1,
    ]


def test_own_runs_can_be_moved_up_but_not_before_those_of_others():
    made = pool(1)
    made.submit_run(ask(1), 100)
    made.submit_run(ask(2, VISION, user=7), 100)
    made.submit_run(ask(3, user=8), 100)
    made.submit_run(ask(4, user=8, moved_up=1.0), 100)
    made.run_until(250)
    assert [line.run for line in made.ledger] == [1, 2, 4]


def test_limits_hold_and_are_told_with_their_numbers():
    made = pool(4, teams={NLP: Share("nlp", 1, limit=2)}, people={3: Person(running=1)})
    for run in (1, 2, 3):
        made.submit_run(ask(run), 100)
    made.submit_run(ask(4, VISION, user=3), 100)
    made.submit_run(ask(5, VISION, user=3), 100)
    assert set(made.running) == {1, 2, 4}
    assert reason(made, 3)[1] == "team nlp holds 2 of at most 2 devices in simulated."
    assert reason(made, 5)[1] == "its owner holds 1 of at most 1 devices."


def test_a_budget_counts_what_running_runs_will_still_take():
    made = pool(4, teams={NLP: Share("nlp", seconds_left=1500.0)})
    for run in (1, 2, 3):
        made.submit_run(ask(run), 1000)
    assert set(made.running) == {1, 2}
    assert "device-hours" in reason(made, 3)[1]


def test_the_reason_names_the_numbers_and_the_run_for_which_a_place_is_kept():
    made = pool(1, teams=teams(nlp=1), most_a_card=2)
    made.submit_run(ask(1), 1000)
    made.submit_run(ask(81, VISION, memory=None), 100)
    made.submit_run(ask(82, user=9, memory=3 * GB, seconds=5000), 100)
    place, words_of_head = reason(made, 81)
    assert (
        place == 1
        and "needs a whole device, and the one device of simulated is in use" in words_of_head
    )
    assert "kept for run 81" in reason(made, 82)[1]


def test_what_can_never_fit_is_told():
    made = pool(1)
    made.submit_run(ask(1, memory=30 * GB), 100)
    assert reason(made, 1)[1] == "needs 30.0 GB, and the largest device of simulated has 24.0 GB."


def test_nothing_starts_on_a_device_that_is_gone_or_dirty_or_in_a_pool_on_hold():
    gone = Scene("p", [Card(0, 24 * GB, usable=False)], waiting=[ask(1)])
    held = Scene("p", [Card(0, 24 * GB)], waiting=[ask(1)], held=True)
    for scene in (gone, held):
        assert not Scheduler(scene).admit(0.0).starts


def test_the_start_is_told_as_a_range():
    cards = [Card(0, 24 * GB)]
    scene = Scene("p", cards, [Holding(1, 0, NLP, 1, 0.0, 20 * GB, ends=1000.0)], [ask(2), ask(3)])
    told = ranges(scene, 400.0)
    assert (told[2].earliest, told[2].latest) == (1000, 1300)
    assert (told[3].earliest, told[3].latest) == (2000, 2800)
    unknown = Scene("p", cards, [Holding(1, 0, NLP, 1, 0.0, 20 * GB)], [ask(2)])
    assert ranges(unknown, 0.0) == {}


def test_a_dry_run_tells_who_would_wait_longer():
    cards = [Card(n, 24 * GB) for n in range(2)]
    before = Scene("p", cards, waiting=[ask(1), ask(2)])
    after = Scene("p", cards, waiting=[ask(1), ask(2)], teams={NLP: Share("nlp", limit=1)})
    assert dry_run(before, after, 0.0) == {2: (0.0, 1000.0)}
    assert dry_run(before, Scene("p", cards, waiting=[ask(1), ask(2)], held=True), 0.0) == {
        1: (0, math.inf),
        2: (0, math.inf),
    }


def test_one_guarantee_makes_room_once_however_many_of_the_team_wait():
    """48 devices asked for, 376 evicted (KAI #1565): what is kept for a team's runs counts as
    held.
    """
    made = pool(6, teams={NLP: Share("nlp", 1, limit=1), VISION: Share("vision")})
    for run in range(1, 7):
        made.submit_run(ask(run, VISION), 100_000)
    made.run_until(2000)
    for run in range(10, 15):
        made.submit_run(ask(run, NLP), 1000)
    assert len(made.evicting) == 1
    made.run_until(2100)
    assert len(made.running) == 6
    assert sum(card.kept_for is not None for card in made.devices.values()) == 0


def test_nobody_starts_on_a_kept_device_that_is_not_good():
    scene = Scene("p", [Card(0, 24 * GB, usable=False, kept_for=1)], waiting=[ask(1)])
    made = Scheduler(scene).admit(0.0)
    assert not made.starts
    assert (
        words(made.barriers[1], scene)
        == "starts when the device that was freed for it is seen to be empty."
    )


def test_a_device_is_kept_no_longer_for_a_run_that_may_not_start():
    scene = Scene(
        "p",
        [Card(0, 24 * GB, kept_for=1)],
        waiting=[ask(1), ask(2, VISION)],
        teams={NLP: Share("nlp", held=True)},
    )
    made = Scheduler(scene).admit(0.0)
    assert made.given_up == [1]
    assert [held.run for held in made.starts] == [2]


def test_a_persons_background_run_does_not_pass_before_anothers_normal_one():
    cards = [Card(0, 80 * GB), Card(1, 24 * GB)]
    waiting = [
        ask(1, NLP, user=1, memory=70 * GB),
        ask(2, NLP, user=1, memory=10 * GB, priority="background"),
        ask(3, NLP, user=2, memory=10 * GB, submitted=9.0),
    ]
    scene = Scene("p", cards, [Holding(9, 0, VISION, 9, 0.0, 70 * GB, ends=50.0)], waiting)
    assert [held.run for held in Scheduler(scene).admit(0.0).starts] == [3]


def test_no_more_leave_a_shared_device_than_must():
    made = SimulatedPool.create_pool(1, 100 * GB, most_a_card=3, teams=teams(nlp=0, vision=1))
    made.submit_run(ask(1, memory=80 * GB), 10_000)
    made.run_until(10)
    made.submit_run(ask(2, memory=10 * GB), 10_000)
    made.run_until(1000)
    made.submit_run(ask(3, VISION, memory=80 * GB), 100)
    assert set(made.evicting) == {1}


def told(scene, run):
    scheduler = Scheduler(scene)
    barrier = barriers(scheduler, scheduler.admit(scene.now).barriers)[run][1]
    return words(barrier, scene), sooner(scheduler, scheduler.requests[run], barrier)


def test_memory_that_other_programs_hold_is_not_given_out_and_is_named():
    scene = Scene(
        "A100", [Card(1, 24 * GB, taken=6 * GB)], waiting=[Request(1, NLP, 1, 0.0, memory=20 * GB)]
    )
    assert not Scheduler(scene).admit(0.0).starts
    reason, cure = told(scene, 1)
    assert (
        reason
        == "needs 20.0 GB, and the one device of A100 has too little room: programs that are no "
        "runs hold 6.0 GB."
    )
    assert cure.startswith("What those programs hold, once it is free again")
    assert Scheduler(replace(scene, cards=[Card(1, 24 * GB, taken=4 * GB)])).admit(0.0).starts


def test_a_run_that_waits_for_other_programs_memory_keeps_nobody_else_from_starting():
    waiting = [Request(1, NLP, 1, 0.0, memory=20 * GB), Request(2, NLP, 2, 1.0, memory=8 * GB)]
    scene = Scene("A100", [Card(1, 24 * GB, taken=10 * GB)], waiting=waiting)
    assert [held.run for held in Scheduler(scene).admit(0.0).starts] == [2]


def test_a_run_without_a_forecast_gets_a_device_of_its_own_whatever_else_is_there():
    scene = Scene("A100", [Card(1, 24 * GB, taken=10 * GB)], waiting=[Request(1, NLP, 1, 0.0)])
    assert [held.run for held in Scheduler(scene).admit(0.0).starts] == [1]


def test_what_is_kept_for_the_head_is_the_reason_only_where_the_run_would_fit():
    holdings = [
        Holding(8, 1, VISION, 3, 0.0, memory=4 * GB, ends=100.0),
        Holding(9, 2, VISION, 3, 0.0, memory=18 * GB, ends=500.0),
    ]
    waiting = [
        Request(1, NLP, 1, 0.0, memory=24 * GB),
        Request(2, NLP, 2, 1.0, memory=10 * GB, seconds=10_000.0),
        Request(3, NLP, 4, 2.0, memory=22 * GB, seconds=10.0),
    ]
    scene = Scene(
        "A100",
        [Card(1, 24 * GB), Card(2, 24 * GB), Card(3, 24 * GB, usable=False)],
        holdings,
        waiting,
        most_a_card=2,
    )
    assert told(scene, 1)[0].startswith(
        "needs 24.0 GB on one of the 2 devices of A100; all of them are in use; 1 more is not"
    )
    assert "is kept for run 1, which comes first" in told(scene, 2)[0]
    assert told(scene, 3)[0].startswith(
        "needs 22.0 GB on one of the 2 devices of A100; all of them are in use"
    )
    assert "an admin who makes it urgent" in told(scene, 2)[1]


def test_a_dry_run_counts_runs_that_make_room():
    holdings = [Holding(9, 1, VISION, 3, -10_000.0, ends=50_000.0)]
    before = Scene(
        "A100",
        [Card(1, 24 * GB)],
        holdings,
        [Request(1, NLP, 1, 0.0, seconds=60.0)],
        teams=teams(nlp=0, vision=0),
    )
    after = replace(before, teams=teams(nlp=1, vision=0))
    assert eta.dry_run(before, after, 0.0) == {1: (50_000.0, 60.0)}
    assert eta.dry_run(after, replace(after, shortest=20_000.0), 0.0) == {1: (60.0, 50_000.0)}
