"""Two bells: `ring` tells workers of a run to look at, `show` tells web servers of something new to send to browsers.

Both may be lost without harm: workers sweep every few seconds, web servers look for themselves. They only make it faster.
"""

from __future__ import annotations

import logging
import sqlite3

from asgiref.sync import async_to_sync
from channels.layers import get_channel_layer
from django.conf import settings
from redis.exceptions import RedisError

GROUP = "runs"
QUEUE_DOWN = (OSError, sqlite3.Error, RedisError)
log = logging.getLogger("snapml.runs")


def ring(run_id: int) -> None:
    """Ask a worker to look at this run. The sweeper would find it too, within 2 s."""
    from training.runs.tasks import supervise

    try:
        supervise(run_id)
    except QUEUE_DOWN as error:  # that must not undo a launch; the sweeper comes by
        log.warning("The queue did not take run %s (%s); the sweeper will find it.", run_id, error)


def show(run_id: int) -> None:
    """Nudge the web servers through Redis, if there is one. SQLite needs no nudge: they see its commits."""
    if settings.CHANNEL_LAYERS:
        try:
            async_to_sync(get_channel_layer().group_send)(GROUP, {"type": "moved", "run": run_id})
        except QUEUE_DOWN as error:  # that must not undo what was done
            log.warning("Redis did not take a nudge (%s); browsers see it up to 250 ms later.", error)
