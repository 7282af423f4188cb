"""Usage of deployments: a log of requests that is kept for a week, and rates computed from it.
Units: seconds, tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
from django.db import transaction
from django.db.models import F
from django.utils import timezone

from adapters.models import AdapterVersion, Deployment, RequestLog, UsageCounter

RETENTION = timedelta(days=7)
RATE_WINDOW = timedelta(minutes=5)
MAX_ROWS = 20_000
MAX_CHART_VERSIONS = 10


@dataclass(frozen=True, kw_only=True)
class RequestRecord:
    """What is logged of a request. `first_token_seconds` is set for streamed answers."""

    deployment_id: int
    version_id: int
    seconds: float
    first_token_seconds: float | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    failed: bool = False


def log_request(record: RequestRecord) -> None:
    """Store a request and count it, unless its deployment or version was deleted meanwhile."""
    with transaction.atomic():
        deployment_exists = Deployment.objects.filter(pk=record.deployment_id).exists()
        if (
            not deployment_exists
            or not AdapterVersion.objects.filter(pk=record.version_id).exists()
        ):
            return
        RequestLog.objects.create(at=timezone.now(), **vars(record))
        counter, _ = UsageCounter.objects.get_or_create(
            deployment_id=record.deployment_id, version_id=record.version_id
        )
        UsageCounter.objects.filter(pk=counter.pk).update(
            answers=F("answers") + int(not record.failed),
            failures=F("failures") + int(record.failed),
            completion_tokens=F("completion_tokens") + record.completion_tokens,
        )


def get_rates(deployment: Deployment) -> dict[str, Any]:
    """Rates of the last minutes: requests per second, median and 95th percentile of the latency,
    time to the first token, tokens per second.
    """
    return get_rates_by_deployment([deployment])[deployment.pk]


def get_rates_by_deployment(deployments: Sequence[Deployment]) -> dict[int, dict[str, Any]]:
    """The rates of several deployments by ID, in one query."""
    since = timezone.now() - RATE_WINDOW
    rows = RequestLog.objects.filter(
        deployment__in=[one.pk for one in deployments], at__gte=since
    ).order_by("-pk")
    logs_by_deployment: dict[int, list[RequestLog]] = {one.pk: [] for one in deployments}
    for row in rows[:MAX_ROWS]:
        logs_by_deployment[row.deployment_id].append(row)
    return {pk: aggregate_rates(group) for pk, group in logs_by_deployment.items()}


def aggregate_rates(rows: Sequence[RequestLog]) -> dict[str, Any]:
    succeeded = [row for row in rows if not row.failed]
    seconds = [row.seconds for row in succeeded]
    first_token_seconds = [
        row.first_token_seconds for row in succeeded if row.first_token_seconds is not None
    ]
    total_seconds = sum(seconds)
    return {
        "requests": len(rows),
        "failures": len(rows) - len(succeeded),
        "requests_per_second": len(rows) / RATE_WINDOW.total_seconds(),
        "median_seconds": float(np.percentile(seconds, 50)) if seconds else None,
        "p95_seconds": float(np.percentile(seconds, 95)) if seconds else None,
        "first_token_seconds": float(np.percentile(first_token_seconds, 50))
        if first_token_seconds
        else None,
        "tokens_per_second": sum(row.completion_tokens for row in succeeded) / total_seconds
        if total_seconds
        else None,
    }


def get_usage_by_minute(deployment: Deployment) -> list[dict[str, Any]]:
    """For the chart: answers, median seconds and failures of each of the last 60 minutes, by
    version. Those with the fewest requests are one group, whose version is None.
    """
    now = timezone.now()
    rows = list(
        RequestLog.objects.filter(
            deployment=deployment, at__gte=now - timedelta(minutes=60)
        ).order_by("-pk")[:MAX_ROWS]
    )
    counts = Counter(row.version_id for row in rows).most_common(MAX_CHART_VERSIONS)
    charted = {version for version, _ in counts}
    logs_by_minute: dict[tuple[int, int | None], list[RequestLog]] = {}
    for row in rows:
        version = row.version_id if row.version_id in charted else None
        minute = int((now - row.at).total_seconds() // 60)
        logs_by_minute.setdefault((minute, version), []).append(row)
    return [
        {
            "minutes_ago": ago,
            "version": version,
            "answers": sum(not row.failed for row in group),
            "failures": sum(row.failed for row in group),
            "median_seconds": float(np.median([row.seconds for row in group])),
        }
        for (ago, version), group in sorted(
            logs_by_minute.items(), key=lambda item: (item[0][0], item[0][1] or 0), reverse=True
        )
    ]


def prune_request_logs() -> None:
    RequestLog.objects.filter(at__lt=timezone.now() - RETENTION).delete()
