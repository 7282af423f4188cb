"""Notify the owner when a run ends: by webhooks, and by the owner's open pages."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

from django.utils import timezone

from training.people.models import User
from training.runs.models import Run
from training.runs.states import ENDED, State
from training.webhooks.services import enqueue_deliveries

# Pages poll every 5 s, hidden tabs once a minute; the browser remembers what it has shown
NOTIFY_WINDOW_SECONDS = 300
MAX_NOTIFICATIONS = 20


def notify_run_ended(run_id: int) -> None:
    """Queue a message for each webhook of the owner. Called once, in the transaction that ends the
    run.
    """
    run = Run.objects.select_related("owner").get(pk=run_id)
    body = {
        "event": "run.ended",
        "run": {
            "id": run.pk,
            "name": run.name,
            "state": run.state,
            "message": run.message,
            "step": run.step,
        },
        "best_eval_loss": run.best_eval_loss,
        "ended_at": (run.finished_at or timezone.now()).isoformat(),
    }
    enqueue_deliveries(run.owner, json.dumps(body))


def get_recently_ended(user: User) -> list[dict[str, Any]]:
    """The user's own runs that ended within NOTIFY_WINDOW_SECONDS, the last MAX_NOTIFICATIONS of
    them, for browser notifications.
    """
    since = timezone.now() - timedelta(seconds=NOTIFY_WINDOW_SECONDS)
    rows = Run.objects.filter(owner=user, state__in=ENDED, finished_at__gte=since).only(
        "pk", "name", "state", "finished_at"
    )
    return [
        {"id": run.pk, "name": run.name, "state": State(run.state).label, "at": run.finished_at}
        for run in rows.order_by("-finished_at")[:MAX_NOTIFICATIONS]
    ]
