"""What deployments have answered: noted one by one, kept for a week, and told as rates. Units:
seconds, tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
from django.db import transaction
from django.db.models import F
from django.utils import timezone

from adapters.models import AdapterVersion, Deployment, Served, Tally

KEPT = timedelta(days=7)
RECENT = timedelta(minutes=5)
MOST_READ = 20_000


@dataclass(frozen=True, kw_only=True)
class Answered:
    deployment_id: int
    version_id: int
    seconds: float
    first_seconds: float | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    failed: bool = False


def note(answered: Answered) -> None:
    """Write an answer down. Its deployment or version may have been deleted meanwhile: then there
    is nothing to note.
    """
    with transaction.atomic():
        there = Deployment.objects.filter(pk=answered.deployment_id).exists()
        if not there or not AdapterVersion.objects.filter(pk=answered.version_id).exists():
            return
        Served.objects.create(at=timezone.now(), **vars(answered))
        tally, _ = Tally.objects.get_or_create(
            deployment_id=answered.deployment_id, version_id=answered.version_id
        )
        Tally.objects.filter(pk=tally.pk).update(
            answers=F("answers") + int(not answered.failed),
            failures=F("failures") + int(answered.failed),
            completion_tokens=F("completion_tokens") + answered.completion_tokens,
        )


def rates(deployment: Deployment) -> dict[str, Any]:
    """Of the last minutes: requests a second, latency's median and 95th percentile, time to the
    first token, tokens a second.
    """
    return rates_of([deployment])[deployment.pk]


def rates_of(deployments: Sequence[Deployment]) -> dict[int, dict[str, Any]]:
    """The same for several, by their number, in one query."""
    since = timezone.now() - RECENT
    rows = Served.objects.filter(
        deployment__in=[one.pk for one in deployments], at__gte=since
    ).order_by("-pk")
    found: dict[int, list[Served]] = {one.pk: [] for one in deployments}
    for row in rows[:MOST_READ]:
        found[row.deployment_id].append(row)
    return {pk: summed_up(group) for pk, group in found.items()}


def summed_up(rows: Sequence[Served]) -> dict[str, Any]:
    good = [row for row in rows if not row.failed]
    seconds = [row.seconds for row in good]
    firsts = [row.first_seconds for row in good if row.first_seconds is not None]
    speaking = sum(seconds)
    return {
        "requests": len(rows),
        "failures": len(rows) - len(good),
        "requests_per_second": len(rows) / RECENT.total_seconds(),
        "median_seconds": float(np.percentile(seconds, 50)) if seconds else None,
        "p95_seconds": float(np.percentile(seconds, 95)) if seconds else None,
        "first_seconds": float(np.percentile(firsts, 50)) if firsts else None,
        "tokens_per_second": sum(row.completion_tokens for row in good) / speaking
        if speaking
        else None,
    }


def by_minute(deployment: Deployment) -> list[dict[str, Any]]:
    """For the chart: answers, median seconds and failures of each of the last 60 minutes, by
    version.
    """
    now = timezone.now()
    rows = Served.objects.filter(
        deployment=deployment, at__gte=now - timedelta(minutes=60)
    ).order_by("-pk")[:MOST_READ]
    found: dict[tuple[int, int], list[Served]] = {}
    for row in rows:
        found.setdefault((int((now - row.at).total_seconds() // 60), row.version_id), []).append(
            row
        )
    return [
        {
            "minutes_ago": ago,
            "version": version,
            "answers": sum(not row.failed for row in group),
            "failures": sum(row.failed for row in group),
            "median_seconds": float(np.median([row.seconds for row in group])),
        }
        for (ago, version), group in sorted(found.items(), reverse=True)
    ]


def forget_old() -> None:
    Served.objects.filter(at__lt=timezone.now() - KEPT).delete()
