"""The audit log and the monthly report, as pages and as files; and a dirty device that is offered
again.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from typing import Any

from django.contrib import messages
from django.core.paginator import Paginator
from django.db.models import Q
from django.http import HttpResponse, HttpResponseBase, StreamingHttpResponse
from django.shortcuts import get_object_or_404, redirect, render
from django.views.decorators.http import require_POST

from training.gpus import audit as log
from training.gpus import quotas, usage
from training.gpus.models import AuditEntry, Device
from training.people.models import User
from training.people.requests import AuthenticatedRequest, async_chunks

ENTRIES_A_PAGE = 100
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")


def audit_entries(user: User, act: str = "", text: str = "") -> Any:
    """All for admins, what concerns their teams for leads; newest first.

    Raises:
        NotAllowed: the person leads no team.
    """
    quotas.refuse_strangers(user)
    seen = usage.teams_seen(user)
    rows = AuditEntry.objects.all() if seen is None else AuditEntry.objects.filter(team__in=seen)
    act, text = act.replace("\0", ""), text.replace("\0", "")
    if act:
        rows = rows.filter(act=act)
    if text:
        rows = rows.filter(
            Q(subject__icontains=text) | Q(actor_name__icontains=text) | Q(reason__icontains=text)
        )
    return rows


def audit(request: AuthenticatedRequest) -> HttpResponse:
    act, text = request.GET.get("act", "")[:30], request.GET.get("q", "")[:100]
    rows = audit_entries(request.user, act, text)
    values = {
        "page": Paginator(rows, ENTRIES_A_PAGE).get_page(request.GET.get("page")),
        "acts": sorted(set(AuditEntry.objects.order_by().values_list("act", flat=True).distinct())),
        "act": act,
        "q": text,
        "broken": log.first_break()
        if request.GET.get("check") and request.user.is_superuser
        else None,
        "checked": bool(request.GET.get("check")) and request.user.is_superuser,
    }
    return render(request, "gpus/audit.html", values)


def audit_file(request: AuthenticatedRequest) -> HttpResponseBase:
    rows = audit_entries(
        request.user, request.GET.get("act", "")[:30], request.GET.get("q", "")[:100]
    )
    head = ["id", "at", "actor", "act", "subject", "before", "after", "reason", "digest"]

    def lines() -> Iterator[list[object]]:
        for row in rows.iterator():
            before, after = json.dumps(row.before), json.dumps(row.after)
            yield [
                row.pk,
                row.at.isoformat(),
                row.actor_name,
                row.act,
                row.subject,
                before,
                after,
                row.reason,
                row.digest,
            ]

    return csv_file(head, lines(), "audit.csv")


def report(request: AuthenticatedRequest) -> HttpResponseBase:
    """`?month=2026-11` as CSV: device-seconds by team, person and pool."""
    quotas.refuse_strangers(request.user)
    text = request.GET.get("month", "")
    moment = usage.month_named(text)
    head = ["team", "person", "pool", "runs", "device_seconds", "device_hours"]
    rows: Iterator[list[object]] = (
        [
            one.team,
            one.user,
            one.pool,
            one.runs,
            round(one.seconds, 3),
            round(one.seconds / 3600, 3),
        ]
        for one in usage.report_lines(request.user, moment)
    )
    return csv_file(head, rows, f"devices-{moment:%Y-%m}.csv")


@require_POST
def offer(request: AuthenticatedRequest, device_id: int) -> HttpResponse:
    quotas.admins_only(request.user)
    device = get_object_or_404(Device, pk=device_id)
    quotas.offer_again(request.user, device, request.POST.get("reason", ""))
    messages.success(request, f"{device} is given out again.")
    return redirect("gpus")


def csv_file(head: list[str], rows: Iterator[list[object]], name: str) -> StreamingHttpResponse:
    """A download, a hundred rows a piece; cells that a spreadsheet would run as a formula are
    quoted.
    """

    def pieces() -> Iterator[bytes]:
        out = io.StringIO()
        writer = csv.writer(out)
        writer.writerow(head)
        for number, row in enumerate(rows, start=1):
            writer.writerow([harmless(cell) for cell in row])
            if number % 100 == 0:
                yield out.getvalue().encode()
                out.seek(0)
                out.truncate()
        yield out.getvalue().encode()

    answer = StreamingHttpResponse(async_chunks(pieces()), content_type="text/csv")
    answer["Content-Disposition"] = f'attachment; filename="{name}"'
    return answer


def harmless(cell: object) -> object:
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(FORMULA_STARTS) else cell
