"""The frames of live sockets. Sockets that need the same frame share one.

Reading and encoding a delta takes about 1 ms, so 500 sockets on one run would need half a second
for each step.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import NamedTuple

from channels.db import database_sync_to_async

from training.runs.live import messages

MAX_CACHED_FRAMES = 32
MAX_CACHED_BYTES = 16 * 2**20


class Revision(NamedTuple):
    """Two equal revisions of a run look the same to a browser."""

    last_seq: int
    row: int  # Run.revision
    is_worker_lost: bool


class FrameRequest(NamedTuple):
    """A snapshot of at most 2 x `points` points, or with 0 points the events after `cursor`."""

    run_id: int
    cursor: int
    points: int


@dataclass(frozen=True)
class Frame:
    text: str
    last_seq: int
    row: int  # Run.revision when the frame was read


class FrameCache:
    """The frames of the current revision of each run that open sockets show."""

    def __init__(self) -> None:
        self._frames: dict[tuple[FrameRequest, Revision], asyncio.Task[Frame]] = {}

    async def get_frame(self, request: FrameRequest, revision: Revision) -> Frame:
        """The frame at `revision` or a later one. Raises what reading it raised."""
        key = (request, revision)
        task = self._frames.get(key)
        if task is None:
            self._evict_frames()
            task = self._frames[key] = asyncio.create_task(self._read_frame(key))
        return await asyncio.shield(task)  # the other sockets wait for it, too

    def drop_run(self, run_id: int) -> None:
        """Drop the frames of a run that has changed, or that no socket shows."""
        for key in [key for key in self._frames if key[0].run_id == run_id]:
            del self._frames[key]

    async def _read_frame(self, key: tuple[FrameRequest, Revision]) -> Frame:
        try:
            frame: Frame = await build_frame(key[0])
        except BaseException:
            self._frames.pop(key, None)
            raise
        return frame

    def _evict_frames(self) -> None:
        """Drop the oldest frames above the limits."""
        while len(self._frames) > MAX_CACHED_FRAMES or self._count_bytes() > MAX_CACHED_BYTES:
            del self._frames[next(iter(self._frames))]

    def _count_bytes(self) -> int:
        return sum(len(task.result().text) for task in self._frames.values() if task.done())


@database_sync_to_async  # type: ignore[untyped-decorator]
def build_frame(request: FrameRequest) -> Frame:
    if request.points:
        message = messages.build_snapshot(request.run_id, request.points)
        last_seq = message["upto"]
    else:
        message = messages.build_delta(request.run_id, request.cursor)
        last_seq = message["last"]
    return Frame(json.dumps(message), last_seq, message["revision"])
