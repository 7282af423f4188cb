"""Count sign-in attempts for all web processes together, in Redis if it is configured, else in the
database. Redis stores plain numbers under hashed keys, nothing pickled.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta
from functools import lru_cache

from django.conf import settings
from django.db import transaction
from django.db.models import F
from django.utils import timezone
from redis import Redis
from redis.exceptions import RedisError

from training.errors import UserError
from training.people.models import SignInAttempts

WINDOW_SECONDS = 300  # from the first attempt; then the count restarts
REDIS_TIMEOUT_SECONDS = 5
REDIS_PREFIX = "snapml:sign-in:"
SUBTRACT_SCRIPT = "if redis.call('exists', KEYS[1]) == 1 then redis.call('decr', KEYS[1]) end"


class CounterUnavailable(UserError):
    """Redis does not respond. Sign-in is disabled, because attempts could not be counted."""

    status = 503

    def __init__(self) -> None:
        super().__init__(
            "Sign-in is unavailable because Redis, which counts the attempts, does not respond. "
            "Try again in a minute.",
            code="redis_unavailable",
        )


def count_attempt(key: str) -> int:
    """Count an attempt. Returns the number of attempts in the window, including this one.

    Raises:
        CounterUnavailable: Redis does not respond.
    """
    return count_in_redis(key) if settings.REDIS_URL else count_in_database(key)


def clear_attempts(keys: Iterable[str]) -> None:
    """Raises CounterUnavailable: Redis does not respond."""
    if not settings.REDIS_URL:
        SignInAttempts.objects.filter(key__in=list(keys)).delete()
        return
    try:
        get_redis_client(settings.REDIS_URL).delete(*(REDIS_PREFIX + key for key in keys))
    except RedisError as error:
        raise CounterUnavailable from error


def subtract_attempt(key: str) -> None:
    """Subtract an attempt that was no wrong guess.

    Raises:
        CounterUnavailable: Redis does not respond.
    """
    if not settings.REDIS_URL:
        SignInAttempts.objects.filter(key=key, count__gt=0).update(count=F("count") - 1)
        return
    try:
        # In one step: the counter may expire, and a new one would have no expiry
        get_redis_client(settings.REDIS_URL).eval(SUBTRACT_SCRIPT, 1, REDIS_PREFIX + key)
    except RedisError as error:
        raise CounterUnavailable from error


def count_in_redis(key: str) -> int:
    """In one transaction, so that every counter has an expiry."""
    try:
        with get_redis_client(settings.REDIS_URL).pipeline(transaction=True) as commands:
            commands.set(REDIS_PREFIX + key, 0, ex=WINDOW_SECONDS, nx=True)
            commands.incr(REDIS_PREFIX + key)
            return int(commands.execute()[1])
    except RedisError as error:
        raise CounterUnavailable from error


def count_in_database(key: str) -> int:
    """Lock and increment the row. Expired rows are deleted first, so the table holds the attempts
    of one window only.
    """
    now = timezone.now()
    SignInAttempts.objects.filter(ends_at__lte=now).delete()
    with transaction.atomic():
        counter, _ = SignInAttempts.objects.select_for_update().get_or_create(
            key=key, defaults={"ends_at": now + timedelta(seconds=WINDOW_SECONDS)}
        )
        counter.count += 1
        counter.save(update_fields=["count"])
    return counter.count


@lru_cache(maxsize=1)
def get_redis_client(url: str) -> Redis:
    return Redis.from_url(url, socket_timeout=REDIS_TIMEOUT_SECONDS)
