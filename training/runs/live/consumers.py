"""The live socket: checks who asks, then forwards a run's stream from the browser's cursor on.

Client: `{"type": "sub", "run", "cursor", "points"}`, `{"type": "ack", "run", "seq"}`, `{"type":
    "unsub", "run"}`.
Server: `snap`, then `delta` after `delta` (messages.py). One frame per subscription may be
    unacknowledged; while it is, the server keeps only a cursor. So a browser that reads slowly
    costs no memory, and gets larger deltas instead of more.
"""

from __future__ import annotations

import asyncio
import json
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
from training.runs.live.change_watcher import GROUP, bell
from training.runs.models import Run
from training.runs.status import out_of_touch

MAX_SUBSCRIPTIONS = 50
MAX_SOCKETS_PER_USER = 20
MAX_MESSAGES_PER_SECOND = 10
MAX_MESSAGE_CHARACTERS = 4096
ACK_SECONDS = 30.0
CHECK_SECONDS = 30.0
POINTS = (10, 2000)

BROKEN = 1011  # RFC 6455: the server met an unexpected condition
SIGNED_OUT, NOT_YOURS, TOO_MUCH, BAD_MESSAGE, TOO_SLOW = 4401, 4403, 4429, 4400, 4408

log = logging.getLogger("snapml.runs")
sockets_of: Counter[int] = Counter()


@dataclass
class Subscription:
    cursor: int
    points: int
    unacked_since: float | None = None
    fresh: bool = True
    # The row's revision, and whether the run was out of touch
    shown: tuple[int, bool] = (
        -1,
        False,
    )


class LiveConsumer(AsyncWebsocketConsumer):  # type: ignore[misc]
    async def connect(self) -> None:
        user = self.scope["user"]
        if not user.is_authenticated or user.must_change_password:
            await self.accept()  # a close before accept reaches the browser without its code
            await self.close(SIGNED_OUT)
            return
        if sockets_of[user.pk] >= MAX_SOCKETS_PER_USER:
            await self.accept()
            await self.close(TOO_MUCH)
            return
        sockets_of[user.pk] += 1
        self.counted = True
        self.user = user
        self.pump: asyncio.Task[None] | None = None
        self.subscriptions: dict[int, Subscription] = {}
        self.received: deque[float] = deque(maxlen=MAX_MESSAGES_PER_SECOND)
        self.wake = asyncio.Event()
        await self.accept()
        if settings.CHANNEL_LAYERS:
            await self.channel_layer.group_add(GROUP, self.channel_name)
        self.pump = asyncio.create_task(self.pump_or_close())

    async def __call__(self, scope: Any, receive: Any, send: Any) -> Any:
        """Whatever ends this socket, its place is given back."""
        self.counted = False
        try:
            return await super().__call__(scope, receive, send)
        finally:
            await self.leave()

    async def disconnect(self, code: int) -> None:
        await self.leave()

    async def leave(self) -> None:
        if not self.counted:
            return
        self.counted = False
        sockets_of[self.user.pk] -= 1
        if self.pump is not None:
            self.pump.cancel()
        for run_id in self.subscriptions:
            bell.leave(run_id, self.wake)
        if settings.CHANNEL_LAYERS:
            await self.channel_layer.group_discard(GROUP, self.channel_name)

    async def moved(self, _event: dict[str, Any]) -> None:
        """A worker's nudge through Redis."""
        await bell.look()

    async def receive(self, text_data: str | None = None, bytes_data: bytes | None = None) -> None:
        if not self.counted:
            return
        if text_data is None or len(text_data) > MAX_MESSAGE_CHARACTERS:
            await self.close(TOO_MUCH)
            return
        try:
            message = json.loads(text_data)
            await self.act_on(message["type"], whole_number(message["run"]), message)
        except (ValueError, KeyError, TypeError, RecursionError):
            await self.close(BAD_MESSAGE)

    async def act_on(self, kind: str, run_id: int, message: dict[str, Any]) -> None:
        subscription = self.subscriptions.get(run_id)
        if kind == "ack" and subscription is not None and subscription.unacked_since is not None:
            subscription.unacked_since = None
            self.wake.set()
        # An ack that answers a frame is not counted: the server itself sets their pace
        elif self.too_fast():
            await self.close(TOO_MUCH)
        elif kind == "sub":
            await self.subscribe(
                run_id, whole_number(message["cursor"]), whole_number(message.get("points", 1000))
            )
        elif kind == "unsub":
            self.unsubscribe(run_id)

    async def subscribe(self, run_id: int, cursor: int, points: int) -> None:
        if len(self.subscriptions) >= MAX_SUBSCRIPTIONS:
            await self.close(TOO_MUCH)
            return
        if not await may_see(self.user, run_id):
            await self.close(NOT_YOURS)
            return
        low, high = POINTS
        self.subscriptions[run_id] = Subscription(cursor, min(max(points, low), high))
        bell.listen(run_id, self.wake)
        self.wake.set()

    def unsubscribe(self, run_id: int) -> None:
        if self.subscriptions.pop(run_id, None) is not None:
            bell.leave(run_id, self.wake)

    async def pump_or_close(self) -> None:
        """A pump that broke must not leave a socket that looks alive: the browser comes back with
        its cursor.
        """
        try:
            await self.pump_for_ever()
        except Exception:
            log.exception("A live socket of %s broke.", self.user)
            await self.close(BROKEN)

    async def pump_for_ever(self) -> None:
        checked_at = time.monotonic()
        while True:
            try:
                await asyncio.wait_for(self.wake.wait(), timeout=1.0)
            except TimeoutError:
                pass
            self.wake.clear()
            now = time.monotonic()
            if now - checked_at > CHECK_SECONDS:
                checked_at = now
                if not await self.still_allowed():
                    return
            for run_id, subscription in list(self.subscriptions.items()):
                if subscription.unacked_since is None:
                    await self.send_news(run_id, subscription)
                elif now - subscription.unacked_since > ACK_SECONDS:
                    await self.close(TOO_SLOW)
                    return

    async def send_news(self, run_id: int, subscription: Subscription) -> None:
        """The next frame, if there is something to tell."""
        last_seq, shown = await standing(run_id)
        if not subscription.fresh and (last_seq, shown) == (
            subscription.cursor,
            subscription.shown,
        ):
            return
        behind = last_seq - subscription.cursor
        if (
            (subscription.fresh and subscription.cursor == 0)
            or behind < 0
            or behind > messages.FAR_BEHIND
        ):
            message = await read_snapshot(run_id, subscription.points)
            subscription.cursor = message["upto"]
        else:
            message = await read_delta(run_id, subscription.cursor)
            subscription.cursor = message["last"]
        subscription.fresh, subscription.shown = False, shown
        subscription.unacked_since = time.monotonic()
        await self.send(text_data=json.dumps(message))

    async def still_allowed(self) -> bool:
        """Signed in still, and every run still visible? A closed session or a left team ends the
        socket.
        """
        user = await user_of_session(self.scope["session"].session_key)
        if user is None or user.pk != self.user.pk:
            await self.close(SIGNED_OUT)
            return False
        for run_id in list(self.subscriptions):
            if not await may_see(user, run_id):
                await self.close(NOT_YOURS)
                return False
        return True

    def too_fast(self) -> bool:
        now = time.monotonic()
        full = len(self.received) == MAX_MESSAGES_PER_SECOND and now - self.received[0] < 1.0
        self.received.append(now)
        return full


def whole_number(value: Any) -> int:
    """A JSON integer from 0 to 2^53; a bool, a float or a string is none."""
    if type(value) is not int or not 0 <= value <= 2**53:
        raise ValueError(f"{value!r} is not a whole number")
    return value


@database_sync_to_async
def may_see(user: User, run_id: int) -> bool:
    return bool(Run.objects.visible_to(user).filter(pk=run_id).exists())


@database_sync_to_async
def standing(run_id: int) -> tuple[int, tuple[int, bool]]:
    run = Run.objects.only("last_seq", "revision", "state", "lease_expires_at").get(pk=run_id)
    return run.last_seq, (run.revision, out_of_touch(run))


@database_sync_to_async
def user_of_session(key: str) -> User | None:
    request = HttpRequest()
    request.session = SessionStore(key)
    user = get_user(request)
    return (
        user
        if isinstance(user, User) and user.is_active and not user.must_change_password
        else None
    )


read_snapshot = database_sync_to_async(messages.snapshot)
read_delta = database_sync_to_async(messages.delta)
