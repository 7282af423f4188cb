"""Tells the sockets of this process which runs have moved. One task looks for all of them.

SQLite: `PRAGMA data_version` changes with every commit of another connection; asking costs 5 us, so
    it is asked every 20 ms.
PostgreSQL: the runs' numbers are read every 250 ms, or at once when a worker's nudge comes through
    Redis.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections import defaultdict
from typing import Any

from asgiref.sync import async_to_sync
from channels.db import database_sync_to_async
from channels.layers import get_channel_layer
from django.conf import settings
from django.db import connection

from training.runs.models import Run
from training.sqlite_queue import QUEUE_ERRORS

GROUP = "runs"
LOOK_SECONDS = 0.02
POLL_SECONDS = 0.25
SURE_SECONDS = 1.0  # looked at even without a sign

log = logging.getLogger("snapml.runs")

Mark = tuple[int, int]  # last event number, revision of the row


class Bell:
    def __init__(self) -> None:
        self._listeners: dict[int, set[asyncio.Event]] = defaultdict(set)
        self._marks: dict[int, Mark] = {}
        self._task: asyncio.Task[None] | None = None
        self._sqlite: sqlite3.Connection | None = None
        self._version = -1

    def listen(self, run_id: int, wake: asyncio.Event) -> None:
        """Set `wake` whenever the run moves."""
        self._listeners[run_id].add(wake)
        if (
            self._task is None
            or self._task.done()
            or self._task.get_loop() is not asyncio.get_running_loop()
        ):
            self._task = asyncio.get_running_loop().create_task(self._look_for_ever())

    def leave(self, run_id: int, wake: asyncio.Event) -> None:
        self._listeners[run_id].discard(wake)
        if not self._listeners[run_id]:
            del self._listeners[run_id]
            self._marks.pop(run_id, None)

    async def look(self) -> None:
        """Read where the watched runs stand, and wake whoever listens to one that moved."""
        marks = await read_marks(list(self._listeners))
        for run_id, mark in marks.items():
            if self._marks.get(run_id) != mark:
                for wake in self._listeners.get(run_id, ()):
                    wake.set()
        self._marks = marks

    async def _look_for_ever(self) -> None:
        sure_at = 0.0
        while self._listeners:
            if time.monotonic() >= sure_at or self._committed():
                sure_at = time.monotonic() + (
                    SURE_SECONDS if connection.vendor == "sqlite" else POLL_SECONDS
                )
                await self.look()
            await asyncio.sleep(LOOK_SECONDS)

    def _committed(self) -> bool:
        """Whether another SQLite connection has committed since the last call."""
        if connection.vendor != "sqlite":
            return False
        if self._sqlite is None:
            self._sqlite = sqlite3.connect(
                str(settings.DATABASES["default"]["NAME"]), check_same_thread=False
            )
        version = self._sqlite.execute("PRAGMA data_version").fetchone()[0]
        moved = version != self._version
        self._version = version
        return bool(moved)


@database_sync_to_async
def read_marks(run_ids: list[int]) -> dict[int, Mark]:
    rows = Run.objects.filter(pk__in=run_ids).values_list("pk", "last_seq", "revision")
    return {pk: (last_seq, revision) for pk, last_seq, revision in rows}


bell = Bell()


def notify_browsers(run_id: int, **_signal: Any) -> None:
    """Nudge the web servers through Redis, if there is one. SQLite needs no nudge: they see its
    commits.
    """
    if settings.CHANNEL_LAYERS:
        try:
            async_to_sync(get_channel_layer().group_send)(GROUP, {"type": "moved", "run": run_id})
        except QUEUE_ERRORS as error:  # that must not undo what was done
            log.warning(
                "Redis did not take a nudge (%s); browsers see it up to 250 ms later.", error
            )
