"""Messages for waiting runs: the reason with its figures, and what would start the run sooner."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from training.formatting import format_bytes
from training.gpus.scheduling.scheduler import Scheduler
from training.gpus.scheduling.state import BlockReason, PoolState, WaitingRun

Details = Mapping[str, Any]


def format_required(details: Details) -> str:
    required = details["required_bytes"]
    return f"needs {format_bytes(required)}" if required else "needs a whole device"


def format_full_message(details: Details, pool_state: PoolState) -> str:
    """No device has enough free memory, or all are in use."""
    num_devices, num_idle = details["devices"], details["idle_devices"]
    used = details["used_by_others"]
    reason = f" ({format_bytes(used)} used by other processes)" if num_idle and used else ""
    suffix = f"{format_unavailable_suffix(details)}{format_team_suffix(details)}."
    if num_devices == 1:
        state = f"has too little free memory{reason}" if num_idle else "is in use"
        return (
            f"{format_required(details)}, but the only device of {pool_state.pool} {state}{suffix}"
        )
    state = "all of them are in use"
    if num_idle:
        idle = "the idle one has" if num_idle == 1 else f"the {num_idle} idle ones have"
        state = f"{idle} too little free memory{reason}"
    return (
        f"{format_required(details)} on one of the {num_devices} devices of {pool_state.pool}; "
        f"{state}{suffix}"
    )


def format_reservation_message(details: Details, pool_state: PoolState) -> str:
    """The run would fit, but only on capacity that is reserved for the first run of the queue."""
    idle = f"{details['idle_devices']} of {details['devices']} devices idle"
    return (
        f"{format_required(details)} in {pool_state.pool}; the free capacity there ({idle}) is "
        f"reserved for run {details['head_run']}, which comes first"
        f"{format_unavailable_suffix(details)}{format_team_suffix(details)}."
    )


def format_unavailable_suffix(details: Details) -> str:
    """Devices that are dirty or missing, or whose host is offline."""
    count = details["unavailable_devices"]
    return f"; {count} more {'is' if count == 1 else 'are'} unavailable" if count else ""


def format_team_suffix(details: Details) -> str:
    if details["team"] == "no team":
        return ""
    return (
        f"; team {details['team']} uses {details['team_running']} device"
        f"{'' if details['team_running'] == 1 else 's'} and is guaranteed {details['guaranteed']}"
    )


def format_behind_message(details: Details, _pool_state: PoolState) -> str:
    ahead = details["ahead"]
    return "1 run is ahead of it." if ahead == 1 else f"{ahead} runs are ahead of it."


# Each completes "position 1 of 2: ..."
REASON_MESSAGES: dict[str, Callable[[Details, PoolState], str]] = {
    "full": format_full_message,
    "reserved": format_reservation_message,
    "behind": format_behind_message,
    "evicting": lambda d, s: (
        f"starts when a device is free; checkpoints are being saved by run {d['runs']}."
    ),
    "checking_device": lambda d, s: "starts when the memory of the device reserved for it is free.",
    "pool_on_hold": lambda d, s: (
        f"pool {s.pool} is on hold; no run starts until an admin lifts the hold."
    ),
    "team_on_hold": lambda d, s: f"team {d['team']} is on hold; none of its queued runs start.",
    "team_limit": lambda d, s: (
        f"team {d['team']} has reached its limit: {d['running']} of {d['limit']} devices of "
        f"{s.pool} in use."
    ),
    "team_hours": lambda d, s: (
        f"team {d['team']} has used its device-hours of this month, or its running runs will."
    ),
    "user_limit": lambda d, s: (
        f"its owner has reached their limit: {d['running']} of {d['limit']} devices in use."
    ),
    "user_hours": lambda d, s: (
        "its owner has used their device-hours of this month, or their running runs will."
    ),
    "crash_pause": lambda d, s: "waits a few seconds after a crash before it is tried again.",
    "max_memory": lambda d, s: (
        f"needs {format_bytes(d['required_bytes'])}, but a run may reserve at most "
        f"{format_bytes(d['max_bytes'])}."
    ),
    "never_fits": lambda d, s: (
        f"needs {format_bytes(d['required_bytes'])}, but the largest device of {s.pool} has "
        f"{format_bytes(d['largest_device_bytes'])}."
    ),
    "no_devices": lambda d, s: (
        f"no device of {s.pool} is available; all are offline, missing, dirty or being checked."
    ),
}
HINTS: dict[str, str] = {
    "team_limit": "Stop another run of the team, or ask an admin to raise the limit.",
    "team_hours": "Ask an admin to raise the budget.",
    "user_limit": "Stop another run of its owner, or ask an admin to raise the limit.",
    "user_hours": "Ask an admin to raise the budget.",
    "max_memory": (
        "Use a smaller batch, a shorter max length or QLoRA, or ask an admin to raise the limit."
    ),
    "never_fits": (
        "Use a smaller batch, a shorter max length or QLoRA, or choose a pool with larger devices."
    ),
    "pool_on_hold": "Ask an admin to lift the hold.",
    "team_on_hold": "Ask an admin to lift the hold, or the team's lead if a lead set it.",
}


def format_block_reason(block: BlockReason, pool_state: PoolState) -> str:
    return REASON_MESSAGES[block.code](block.details, pool_state)


def get_hint(scheduler: Scheduler, waiting_run: WaitingRun, block: BlockReason) -> str:
    """What would make the run start sooner, as far as the pool's state shows; else empty."""
    if block.code in HINTS:
        return HINTS[block.code]
    free_bytes = scheduler.max_free_bytes
    if block.code == "full" and block.details["idle_devices"] and block.details["used_by_others"]:
        return (
            "Free the memory that other processes use, or use a smaller batch, a shorter max "
            "length or QLoRA."
        )
    if (
        block.code in ("full", "reserved")
        and waiting_run.memory
        and 0 < free_bytes < waiting_run.memory
        and scheduler.pool_state.runs_per_device > 1
    ):
        return f"With at most {format_bytes(free_bytes)} it would fit next to another run now."
    if waiting_run.priority == "background":
        return "With normal priority it would come before all background runs."
    if block.code in ("full", "reserved", "behind") and waiting_run.priority == "normal":
        return "Choose a pool with a free device, or ask an admin for urgent priority."
    return ""


def iter_queue_order(scheduler: Scheduler) -> Iterator[WaitingRun]:
    """Every waiting run, in the order in which a pass would examine them now."""
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
    """The queue position and block reason of every waiting run, by run.

    `block_reasons` are those of the last pass. Runs that the pass did not reach get a reason here.
    """
    explained = {}
    for position, waiting_run in enumerate(iter_queue_order(scheduler), start=1):
        block = block_reasons.get(waiting_run.run)
        if scheduler.pool_state.is_on_hold:
            block = BlockReason("pool_on_hold")
        elif not scheduler.num_schedulable and (block is None or block.code == "full"):
            block = BlockReason("no_devices")
        explained[waiting_run.run] = (
            position,
            block
            or scheduler.find_quota_block(waiting_run)
            or BlockReason("behind", {"ahead": position - 1}),
        )
    return explained
