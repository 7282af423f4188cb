"""Wake the sockets of this process when a run changes. One task polls for all sockets.

SQLite: `PRAGMA data_version` changes with every commit of another connection. It takes 5 us, so it
    is polled every 20 ms.
PostgreSQL: the revisions of the watched runs are read every 250 ms, or at once after a notification
    through Redis.
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

from training.runs.live.frames import FrameCache, Revision
from training.runs.models import Run
from training.runs.status import is_worker_lost
from training.sqlite_queue import QUEUE_ERRORS

GROUP = "runs"
COMMIT_POLL_SECONDS = 0.02
POLL_SECONDS = 0.25
FULL_POLL_SECONDS = 1.0  # with SQLite, even if no commit was noticed

log = logging.getLogger("snapml.runs")


class ChangeWatcher:
    """Polls the revisions of the runs that open sockets show, and wakes the sockets of those that
    changed.

    There is one instance per web process, in the event loop. Its task starts with the first
    listener and ends with the last one.
    """

    def __init__(self) -> None:
        self._listeners: dict[int, set[asyncio.Event]] = defaultdict(set)
        self._revisions: dict[int, Revision | None] = {}
        self.frames = FrameCache()
        self._poll_lock = asyncio.Lock()
        self._polls = 0
        self._task: asyncio.Task[None] | None = None
        self._sqlite: sqlite3.Connection | None = None
        self._version = -1

    def add_listener(self, run_id: int, wake: asyncio.Event) -> None:
        """Set `wake` whenever the run changes."""
        self._listeners[run_id].add(wake)
        if (
            self._task is None
            or self._task.done()
            or self._task.get_loop() is not asyncio.get_running_loop()
        ):
            self._poll_lock = asyncio.Lock()  # belongs to one event loop
            self._task = asyncio.get_running_loop().create_task(self._poll_loop())

    def remove_listener(self, run_id: int, wake: asyncio.Event) -> None:
        self._listeners[run_id].discard(wake)
        if not self._listeners[run_id]:
            del self._listeners[run_id]
            self._revisions.pop(run_id, None)
            self.frames.drop_run(run_id)

    async def get_revision(self, run_id: int) -> Revision | None:
        """The revision of a run that has a listener; None if the run was deleted."""
        if run_id not in self._revisions:
            await self.poll_revisions()
        return self._revisions.get(run_id)

    async def poll_revisions(self) -> None:
        """Read the revisions of the watched runs, and wake the listeners of those that changed."""
        requested = self._polls
        async with self._poll_lock:  # an older read must not replace a newer one
            if self._polls > requested:
                return  # one that started later has just ended
            self._polls += 1
            run_ids = list(self._listeners)
            revisions = await read_revisions(run_ids)
        for run_id in run_ids:
            revision = revisions.get(run_id)
            if run_id not in self._listeners or self._revisions.get(run_id) == revision:
                continue
            self._revisions[run_id] = revision
            self.frames.drop_run(run_id)
            for wake in self._listeners[run_id]:
                wake.set()

    async def _poll_loop(self) -> None:
        full_poll_at = 0.0
        while self._listeners:
            if time.monotonic() >= full_poll_at or self._has_new_commit():
                full_poll_at = time.monotonic() + (
                    FULL_POLL_SECONDS if connection.vendor == "sqlite" else POLL_SECONDS
                )
                await self.poll_revisions()
            await asyncio.sleep(COMMIT_POLL_SECONDS)

    def _has_new_commit(self) -> bool:
        """Whether another SQLite connection has committed since the last call."""
        if connection.vendor != "sqlite":
            return False
        if self._sqlite is None:
            self._sqlite = sqlite3.connect(
                str(settings.DATABASES["default"]["NAME"]), check_same_thread=False
            )
        version = self._sqlite.execute("PRAGMA data_version").fetchone()[0]
        has_changed = version != self._version
        self._version = version
        return bool(has_changed)


@database_sync_to_async
def read_revisions(run_ids: list[int]) -> dict[int, Revision]:
    runs = Run.objects.filter(pk__in=run_ids)
    runs = runs.only("last_seq", "revision", "state", "lease_expires_at")
    return {run.pk: Revision(run.last_seq, run.revision, is_worker_lost(run)) for run in runs}


watcher = ChangeWatcher()


def notify_browsers(run_id: int, **_signal: Any) -> None:
    """Notify the web servers through Redis, if configured. SQLite needs no notification: the web
    server polls for commits.
    """
    if settings.CHANNEL_LAYERS:
        try:
            async_to_sync(get_channel_layer().group_send)(
                GROUP, {"type": "run_changed", "run": run_id}
            )
        except QUEUE_ERRORS as error:  # it must not undo the change
            log.warning("Redis is not available (%s). Browsers update up to 250 ms later.", error)
