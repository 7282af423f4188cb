"""The user for whom code runs, and the slots for child programs that count for that user."""

from __future__ import annotations

from contextlib import AbstractContextManager
from contextvars import ContextVar

from django.conf import settings

from training.child_slots import ChildSlots

SLOT_TIMEOUT_SECONDS = 30.0
# Set by CurrentUserMiddleware and by the API's tokens; empty outside of requests
current_username: ContextVar[str] = ContextVar("current_username", default="")


def hold_program_slot(memory_bytes: int) -> AbstractContextManager[None]:
    """Wait for a slot for a child program with this limit of memory. In a request it is one of
    those for programs that the user waits for; elsewhere one of those for background work, however
    long that takes.

    Raises:
        SlotsBusy: in a request, no slot became free within SLOT_TIMEOUT_SECONDS.
    """
    slots: ChildSlots = settings.CHILD_SLOTS
    username = current_username.get()
    if not username:
        return slots.hold_background_slot(memory_bytes, on_wait=lambda: None)
    return slots.hold_interactive_slot(username, memory_bytes, seconds=SLOT_TIMEOUT_SECONDS)
