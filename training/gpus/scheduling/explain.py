"""A waiting run's reason as a sentence with its numbers, and what would make it start sooner."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from training.formatting import format_bytes
from training.gpus.scheduling.scheduler import Scheduler
from training.gpus.scheduling.state import Barrier, Request, Scene

Facts = Mapping[str, Any]


def team_words(facts: Facts) -> str:
    if facts["team"] == "no team":
        return ""
    return (
        f"; team {facts['team']} holds {facts['holds']}, and {facts['guaranteed']} are its "
        "guarantee"
    )


def full(facts: Facts, scene: Scene) -> str:
    need = format_bytes(facts["needs"]) if facts["needs"] else "a whole device"
    held = (
        f": programs that are no runs hold {format_bytes(facts['taken'])}"
        if facts["idle"] and facts["taken"]
        else ""
    )
    more = f"{unusable_words(facts)}{team_words(facts)}."
    if facts["devices"] == 1:
        state = f"has too little room{held}" if facts["idle"] else "is in use"
        return f"needs {need}, and the one device of {scene.pool} {state}{more}"
    idle = (
        f"{facts['idle']} idle ones have too little room{held}"
        if facts["idle"]
        else "all of them are in use"
    )
    return f"needs {need} on one of the {facts['devices']} devices of {scene.pool}; {idle}{more}"


def unusable_words(facts: Facts) -> str:
    """Devices that are not given out: dirty, missing, or their host is gone."""
    number = facts["unusable"]
    return f"; {number} more {'is' if number == 1 else 'are'} not given out now" if number else ""


def kept(facts: Facts, scene: Scene) -> str:
    need = format_bytes(facts["needs"]) if facts["needs"] else "a whole device"
    idle = (
        f"{facts['idle']} of its {facts['devices']} devices idle"
        if facts["idle"]
        else "no device idle"
    )
    head = f"what is free there, {idle}, is kept for run {facts['head']}, which comes first"
    return f"needs {need} in {scene.pool}; {head}{unusable_words(facts)}{team_words(facts)}."


SENTENCES: dict[str, Callable[[Facts, Scene], str]] = {
    "full": full,
    "kept": kept,
    "leaving": lambda f, s: (
        f"starts when run {f['for']} has saved its checkpoint and left its device."
    ),
    "checked": lambda f, s: "starts when the device that was freed for it is seen to be empty.",
    "pool_held": lambda f, s: f"{s.pool} is on hold: an admin lets nothing start there now.",
    "team_held": lambda f, s: f"team {f['team']} is on hold: none of its runs starts now.",
    "team_limit": lambda f, s: (
        f"team {f['team']} holds {f['holds']} of at most {f['limit']} devices in {s.pool}."
    ),
    "team_hours": lambda f, s: (
        f"team {f['team']} has used its device-hours of this month, or its running runs will."
    ),
    "user_limit": lambda f, s: f"its owner holds {f['holds']} of at most {f['limit']} devices.",
    "user_hours": lambda f, s: (
        "its owner has used their device-hours of this month, or their running runs will."
    ),
    "pause": lambda f, s: "waits a few seconds after a crash before it tries again.",
    "most_memory": lambda f, s: (
        f"needs {format_bytes(f['needs'])}, and a run may reserve at most "
        f"{format_bytes(f['most'])}."
    ),
    "never_fits": lambda f, s: (
        f"needs {format_bytes(f['needs'])}, and the largest device of {s.pool} has "
        f"{format_bytes(f['largest'])}."
    ),
    "no_devices": lambda f, s: (
        f"no device of {s.pool} reports; a worker must run on a host that has one."
    ),
    "behind": lambda f, s: f"{f['ahead']} runs are ahead of it.",
}
SOONER: dict[str, str] = {
    "team_limit": "A run of the team that ends, or an admin who raises the limit.",
    "team_hours": "The next month, or an admin who raises the budget.",
    "user_limit": "A run of its owner that ends, or an admin who raises that limit.",
    "user_hours": "The next month, or an admin who raises the budget.",
    "most_memory": "A smaller batch, a shorter length or QLoRA; or an admin who raises the limit.",
    "never_fits": "A smaller batch, a shorter length or QLoRA; or a pool with larger devices.",
    "pool_held": "An admin who lifts the hold.",
    "team_held": "An admin who lifts the hold; a lead of the team, if a lead holds it.",
}


def words(barrier: Barrier, scene: Scene) -> str:
    return SENTENCES[barrier.why](barrier.facts, scene)


def sooner(scheduler: Scheduler, request: Request, barrier: Barrier) -> str:
    """What would let it start sooner, as far as this scene shows."""
    if barrier.why in SOONER:
        return SOONER[barrier.why]
    room = scheduler.most_room
    if barrier.why == "full" and barrier.facts["idle"] and barrier.facts["taken"]:
        return (
            "What those programs hold, once it is free again; a smaller batch, a shorter "
            "length or QLoRA."
        )
    if (
        barrier.why in ("full", "kept")
        and request.memory
        and 0 < room < request.memory
        and scheduler.scene.most_a_card > 1
    ):
        return f"With at most {format_bytes(room)} it would fit beside another run now."
    if request.priority == "background":
        return "As a normal run it would come before all background runs."
    if barrier.why in ("full", "kept", "behind") and request.priority == "normal":
        return (
            "A run there that ends sooner, a pool with a free device, or an admin who makes it "
            "urgent."
        )
    return ""


def in_order(scheduler: Scheduler) -> Iterator[Request]:
    """Whoever waits, in the order in which a pass would look at them now: everybody's runs in their
    own order.
    """
    heads = [
        (scheduler.key_of(requests[0]), 0, line)
        for line, requests in scheduler.lines.items()
        if requests
    ]
    heapq.heapify(heads)
    while heads:
        _, at, line = heapq.heappop(heads)
        requests = scheduler.lines[line]
        yield requests[at]
        if at + 1 < len(requests):
            heapq.heappush(heads, (scheduler.key_of(requests[at + 1]), at + 1, line))


def barriers(scheduler: Scheduler, found: Mapping[int, Barrier]) -> dict[int, tuple[int, Barrier]]:
    """Place in the queue and barrier of everyone who waits, those included that the pass did not
    reach.
    """
    told = {}
    for place, request in enumerate(in_order(scheduler), start=1):
        barrier = found.get(request.run)
        if scheduler.scene.held:
            barrier = Barrier("pool_held")
        elif not any(card.usable for card in scheduler.cards.values()):
            barrier = Barrier("no_devices")
        told[request.run] = (
            place,
            barrier or scheduler.limits(request) or Barrier("behind", {"ahead": place - 1}),
        )
    return told
