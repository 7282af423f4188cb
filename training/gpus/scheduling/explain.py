"""A waiting run's reason as a sentence with its numbers, and what would make it start sooner."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from training.formatting import format_bytes
from training.gpus.scheduling.scheduler import Scheduler
from training.gpus.scheduling.state import BlockReason, PendingJob, PoolState

Details = Mapping[str, Any]


def format_team_suffix(details: Details) -> str:
    if details["team"] == "no team":
        return ""
    return (
        f"; team {details['team']} holds {details['holds']}, and {details['guaranteed']} are its "
        "guarantee"
    )


def format_full_message(details: Details, pool_state: PoolState) -> str:
    required = format_bytes(details["needs"]) if details["needs"] else "a whole device"
    others_message = (
        f": programs that are no runs hold {format_bytes(details['taken'])}"
        if details["idle"] and details["taken"]
        else ""
    )
    suffix = f"{format_unavailable_suffix(details)}{format_team_suffix(details)}."
    if details["devices"] == 1:
        state = f"has too little room{others_message}" if details["idle"] else "is in use"
        return f"needs {required}, and the one device of {pool_state.pool} {state}{suffix}"
    idle = (
        f"{details['idle']} idle ones have too little room{others_message}"
        if details["idle"]
        else "all of them are in use"
    )
    return f"needs {required} on one of the {details['devices']} devices of {pool_state.pool}; {idle}{suffix}"


def format_unavailable_suffix(details: Details) -> str:
    """Devices that are not given out: dirty, missing, or their host is gone."""
    count = details["unusable"]
    return f"; {count} more {'is' if count == 1 else 'are'} not given out now" if count else ""


def format_reservation_message(details: Details, pool_state: PoolState) -> str:
    required = format_bytes(details["needs"]) if details["needs"] else "a whole device"
    idle = (
        f"{details['idle']} of its {details['devices']} devices idle"
        if details["idle"]
        else "no device idle"
    )
    reservation = (
        f"what is free there, {idle}, is kept for run {details['head']}, which comes first"
    )
    return f"needs {required} in {pool_state.pool}; {reservation}{format_unavailable_suffix(details)}{format_team_suffix(details)}."


REASON_MESSAGES: dict[str, Callable[[Details, PoolState], str]] = {
    "full": format_full_message,
    "kept": format_reservation_message,
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
HINTS: dict[str, str] = {
    "team_limit": "A run of the team that ends, or an admin who raises the limit.",
    "team_hours": "The next month, or an admin who raises the budget.",
    "user_limit": "A run of its owner that ends, or an admin who raises that limit.",
    "user_hours": "The next month, or an admin who raises the budget.",
    "most_memory": "A smaller batch, a shorter length or QLoRA; or an admin who raises the limit.",
    "never_fits": "A smaller batch, a shorter length or QLoRA; or a pool with larger devices.",
    "pool_held": "An admin who lifts the hold.",
    "team_held": "An admin who lifts the hold; a lead of the team, if a lead holds it.",
}


def format_block_reason(block: BlockReason, pool_state: PoolState) -> str:
    return REASON_MESSAGES[block.code](block.details, pool_state)


def get_hint(scheduler: Scheduler, pending: PendingJob, block: BlockReason) -> str:
    """What would let it start sooner, as far as this scene shows."""
    if block.code in HINTS:
        return HINTS[block.code]
    free_bytes = scheduler.max_free_bytes
    if block.code == "full" and block.details["idle"] and block.details["taken"]:
        return (
            "What those programs hold, once it is free again; a smaller batch, a shorter "
            "length or QLoRA."
        )
    if (
        block.code in ("full", "kept")
        and pending.memory
        and 0 < free_bytes < pending.memory
        and scheduler.pool_state.runs_per_device > 1
    ):
        return f"With at most {format_bytes(free_bytes)} it would fit beside another run now."
    if pending.priority == "background":
        return "As a normal run it would come before all background runs."
    if block.code in ("full", "kept", "behind") and pending.priority == "normal":
        return (
            "A run there that ends sooner, a pool with a free device, or an admin who makes it "
            "urgent."
        )
    return ""


def iter_queue_order(scheduler: Scheduler) -> Iterator[PendingJob]:
    """Whoever waits, in the order in which a pass would look at them now: everybody's runs in their
    own order.
    """
    heads = [
        (scheduler.get_sort_key(queue[0]), 0, queue_key)
        for queue_key, queue in scheduler.queues.items()
        if queue
    ]
    heapq.heapify(heads)
    while heads:
        _, position, queue_key = heapq.heappop(heads)
        queue = scheduler.queues[queue_key]
        yield queue[position]
        if position + 1 < len(queue):
            heapq.heappush(
                heads, (scheduler.get_sort_key(queue[position + 1]), position + 1, queue_key)
            )


def explain_queue(
    scheduler: Scheduler, block_reasons: Mapping[int, BlockReason]
) -> dict[int, tuple[int, BlockReason]]:
    """Place in the queue and barrier of everyone who waits, those included that the pass did not
    reach.
    """
    explained = {}
    for position, pending in enumerate(iter_queue_order(scheduler), start=1):
        block = block_reasons.get(pending.run)
        if scheduler.pool_state.is_on_hold:
            block = BlockReason("pool_held")
        elif not any(device.is_schedulable for device in scheduler.devices.values()):
            block = BlockReason("no_devices")
        explained[pending.run] = (
            position,
            block
            or scheduler.find_quota_block(pending)
            or BlockReason("behind", {"ahead": position - 1}),
        )
    return explained
