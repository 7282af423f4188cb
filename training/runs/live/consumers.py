"""The live socket: check permissions, then send a run's events from the browser's cursor on.

Client: `{"type": "sub", "run", "cursor", "points"}`, `{"type": "ack", "run", "seq"}`,
    `{"type": "unsub", "run"}`.

Server: `snap`, then one `delta` after another (messages.py). Each run has at most one
unacknowledged frame, whatever the client subscribes to again. A frame is sent only while fewer
than MAX_UNACKED_BYTES of the socket are unacknowledged; meanwhile the server keeps only a cursor.
A slow browser therefore costs no memory: it gets larger deltas, not more of them.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, deque
from dataclasses import dataclass
from typing import Any

from channels.db import database_sync_to_async
from channels.generic.websocket import AsyncWebsocketConsumer
from django.conf import settings
from django.contrib.auth import get_user
from django.contrib.sessions.backends.db import SessionStore
from django.http import HttpRequest

from training.people.models import User
from training.runs.live import messages
from training.runs.live.change_watcher import GROUP, watcher
from training.runs.live.frames import FrameRequest, Revision
from training.runs.models import Run
from training.text_input import InvalidInput, parse_json

MAX_SUBSCRIPTIONS = 50
MAX_SOCKETS_PER_USER = 20
MAX_MESSAGES_PER_SECOND = 10
MAX_MESSAGE_CHARACTERS = 4096
MAX_UNACKED_BYTES = 4 * 2**20  # a frame has less than 4 MiB, so a socket has less than 8 MiB
ACK_SECONDS = 30.0
CHECK_SECONDS = 5.0  # until a user who loses access loses the socket
POINTS = (10, 2000)

INTERNAL_ERROR = 1011  # RFC 6455: the server met an unexpected condition
SIGNED_OUT, FORBIDDEN, LIMIT_EXCEEDED, BAD_MESSAGE, TOO_SLOW = 4401, 4403, 4429, 4400, 4408

log = logging.getLogger("snapml.runs")
sockets_per_user: Counter[int] = Counter()


@dataclass(frozen=True)
class UnackedFrame:
    sent_at: float
    size: int


@dataclass
class Subscription:
    cursor: int
    points: int
    sent: Revision | None = None


class LiveConsumer(AsyncWebsocketConsumer):  # type: ignore[misc]
    """The socket of one browser page, with one subscription per run that the page shows.

    Channels creates it for a connection and runs it in the event loop. Its pump task sends updates
    until the socket is closed, by the browser or with one of the close codes above.
    """

    async def connect(self) -> None:
        user = self.scope["user"]
        if not user.is_authenticated or user.must_change_password:
            await self.accept()  # a close before accept reaches the browser without its code
            await self.close(SIGNED_OUT)
            return
        if sockets_per_user[user.pk] >= MAX_SOCKETS_PER_USER:
            await self.accept()
            await self.close(LIMIT_EXCEEDED)
            return
        sockets_per_user[user.pk] += 1
        self.is_counted = True
        self.user = user
        self.pump_task: asyncio.Task[None] | None = None
        self.subscriptions: dict[int, Subscription] = {}
        self.unacked: dict[int, UnackedFrame] = {}  # by run; also of subscriptions that have ended
        self.received_at: deque[float] = deque(maxlen=MAX_MESSAGES_PER_SECOND)
        self.wake = asyncio.Event()
        await self.accept()
        if settings.CHANNEL_LAYERS:
            await self.channel_layer.group_add(GROUP, self.channel_name)
        self.pump_task = asyncio.create_task(self.run_pump())

    async def __call__(self, scope: Any, receive: Any, send: Any) -> Any:
        """Release the socket however the connection ends."""
        self.is_counted = False
        try:
            return await super().__call__(scope, receive, send)
        finally:
            await self.release_socket()

    async def disconnect(self, code: int) -> None:
        await self.release_socket()

    async def release_socket(self) -> None:
        if not self.is_counted:
            return
        self.is_counted = False
        sockets_per_user[self.user.pk] -= 1
        if self.pump_task is not None:
            self.pump_task.cancel()
        for run_id in self.subscriptions:
            watcher.remove_listener(run_id, self.wake)
        if settings.CHANNEL_LAYERS:
            await self.channel_layer.group_discard(GROUP, self.channel_name)

    async def run_changed(self, _event: dict[str, Any]) -> None:
        """Handler of notifications from workers through Redis."""
        await watcher.poll_revisions()

    async def receive(self, text_data: str | None = None, bytes_data: bytes | None = None) -> None:
        if not self.is_counted:
            return
        if text_data is None or len(text_data) > MAX_MESSAGE_CHARACTERS:
            await self.close(LIMIT_EXCEEDED)
            return
        try:
            message = parse_json(text_data, "The message")
            await self.handle_message(message["type"], parse_whole_number(message["run"]), message)
        except (InvalidInput, ValueError, KeyError, TypeError):
            await self.close(BAD_MESSAGE)

    async def handle_message(self, kind: str, run_id: int, message: dict[str, Any]) -> None:
        if kind == "ack" and run_id in self.unacked:
            del self.unacked[run_id]
            self.wake.set()
        # Acknowledgments of frames do not count against the rate limit: the server sets their pace
        elif self.is_rate_limited():
            await self.close(LIMIT_EXCEEDED)
        elif kind == "sub":
            await self.subscribe(
                run_id,
                parse_whole_number(message["cursor"]),
                parse_whole_number(message.get("points", 1000)),
            )
        elif kind == "unsub":
            self.unsubscribe(run_id)

    async def subscribe(self, run_id: int, cursor: int, points: int) -> None:
        if len(self.subscriptions) >= MAX_SUBSCRIPTIONS:
            await self.close(LIMIT_EXCEEDED)
            return
        if not await can_view_run(self.user, run_id):
            await self.close(FORBIDDEN)
            return
        low, high = POINTS
        self.subscriptions[run_id] = Subscription(cursor, min(max(points, low), high))
        watcher.add_listener(run_id, self.wake)
        self.wake.set()

    def unsubscribe(self, run_id: int) -> None:
        if self.subscriptions.pop(run_id, None) is not None:
            watcher.remove_listener(run_id, self.wake)

    async def run_pump(self) -> None:
        """Run the pump, and close the socket if it fails, so that the browser reconnects with its
        cursor.
        """
        try:
            await self.pump_updates()
        except Exception:
            log.exception("A live socket of %s failed.", self.user)
            await self.close(INTERNAL_ERROR)

    async def pump_updates(self) -> None:
        checked_at = time.monotonic()
        while True:
            try:
                async with asyncio.timeout(1.0):
                    await self.wake.wait()
            except TimeoutError:
                pass
            self.wake.clear()
            now = time.monotonic()
            if now - checked_at > CHECK_SECONDS:
                checked_at = now
                if not await self.is_still_allowed():
                    return
            if any(now - frame.sent_at > ACK_SECONDS for frame in self.unacked.values()):
                await self.close(TOO_SLOW)
                return
            for run_id, subscription in list(self.subscriptions.items()):
                unacked_bytes = sum(frame.size for frame in self.unacked.values())
                if run_id not in self.unacked and unacked_bytes < MAX_UNACKED_BYTES:
                    await self.send_updates(run_id, subscription)

    async def send_updates(self, run_id: int, subscription: Subscription) -> None:
        """Send the next frame if the run has changed."""
        revision = await watcher.get_revision(run_id)
        if self.subscriptions.get(run_id) is not subscription:
            return
        if revision is None:  # the run was deleted
            self.unsubscribe(run_id)
            await self.close(FORBIDDEN)
            return
        sent, behind = subscription.sent, revision.last_seq - subscription.cursor
        if (
            sent is not None
            and behind <= 0
            and revision.row <= sent.row
            and revision.is_worker_lost == sent.is_worker_lost
        ):
            return
        is_first = sent is None and (subscription.cursor == 0 or behind < 0)
        if is_first or behind > messages.RESYNC_THRESHOLD:
            request = FrameRequest(run_id, 0, subscription.points)
        else:
            request = FrameRequest(run_id, subscription.cursor, points=0)
        frame = await watcher.frames.get_frame(request, revision)
        if self.subscriptions.get(run_id) is not subscription:
            return
        subscription.cursor = frame.last_seq
        subscription.sent = Revision(frame.last_seq, frame.row, revision.is_worker_lost)
        self.unacked[run_id] = UnackedFrame(time.monotonic(), len(frame.text))
        await self.send(text_data=frame.text)

    async def is_still_allowed(self) -> bool:
        """Whether the user is still signed in and may see every subscribed run. If not, the socket
        is closed.
        """
        user = await get_session_user(self.scope["session"].session_key)
        if user is None or user.pk != self.user.pk:
            await self.close(SIGNED_OUT)
            return False
        for run_id in list(self.subscriptions):
            if not await can_view_run(user, run_id):
                await self.close(FORBIDDEN)
                return False
        return True

    def is_rate_limited(self) -> bool:
        now = time.monotonic()
        is_full = (
            len(self.received_at) == MAX_MESSAGES_PER_SECOND and now - self.received_at[0] < 1.0
        )
        self.received_at.append(now)
        return is_full


def parse_whole_number(value: Any) -> int:
    """A JSON integer from 0 to 2^53. Booleans, floats and strings raise ValueError."""
    if type(value) is not int or not 0 <= value <= 2**53:
        raise ValueError(f"{value!r} is not a whole number")
    return value


@database_sync_to_async
def can_view_run(user: User, run_id: int) -> bool:
    return bool(Run.objects.visible_to(user).filter(pk=run_id).exists())


@database_sync_to_async
def get_session_user(key: str) -> User | None:
    request = HttpRequest()
    request.session = SessionStore(key)
    user = get_user(request)
    return (
        user
        if isinstance(user, User) and user.is_active and not user.must_change_password
        else None
    )
