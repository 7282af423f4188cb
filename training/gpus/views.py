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

from training.gpus import audit as audit_log
from training.gpus import quotas, usage
from training.gpus.models import AuditEntry, Device
from training.people.models import User
from training.people.requests import AuthenticatedRequest, async_chunks

ENTRIES_PER_PAGE = 100
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")


def filter_audit_entries(user: User, action: str = "", text: str = "") -> Any:
    """All for admins, what concerns their teams for leads; newest first.

    Raises:
        NotAllowed: the person leads no team.
    """
    quotas.check_lead_or_admin(user)
    visible_ids = usage.get_visible_teams(user)
    rows = (
        AuditEntry.objects.all()
        if visible_ids is None
        else AuditEntry.objects.filter(team__in=visible_ids)
    )
    action, text = action.replace("\0", ""), text.replace("\0", "")
    if action:
        rows = rows.filter(action=action)
    if text:
        rows = rows.filter(
            Q(subject__icontains=text) | Q(actor_name__icontains=text) | Q(reason__icontains=text)
        )
    return rows


def show_audit_log(request: AuthenticatedRequest) -> HttpResponse:
    action, text = request.GET.get("action", "")[:30], request.GET.get("q", "")[:100]
    rows = filter_audit_entries(request.user, action, text)
    values = {
        "page": Paginator(rows, ENTRIES_PER_PAGE).get_page(request.GET.get("page")),
        "acts": sorted(
            set(AuditEntry.objects.order_by().values_list("action", flat=True).distinct())
        ),
        "action": action,
        "q": text,
        "broken": audit_log.find_tampered_entry()
        if request.GET.get("check") and request.user.is_superuser
        else None,
        "checked": bool(request.GET.get("check")) and request.user.is_superuser,
    }
    return render(request, "gpus/audit.html", values)


def download_audit_log(request: AuthenticatedRequest) -> HttpResponseBase:
    rows = filter_audit_entries(
        request.user, request.GET.get("action", "")[:30], request.GET.get("q", "")[:100]
    )
    header = ["id", "at", "actor", "action", "subject", "before", "after", "reason", "digest"]

    def iter_lines() -> Iterator[list[object]]:
        for row in rows.iterator():
            before, after = json.dumps(row.before), json.dumps(row.after)
            yield [
                row.pk,
                row.at.isoformat(),
                row.actor_name,
                row.action,
                row.subject,
                before,
                after,
                row.reason,
                row.digest,
            ]

    return build_csv_response(header, iter_lines(), "audit.csv")


def download_report(request: AuthenticatedRequest) -> HttpResponseBase:
    """`?month=2026-11` as CSV: device-seconds by team, person and pool."""
    quotas.check_lead_or_admin(request.user)
    text = request.GET.get("month", "")
    moment = usage.parse_month(text)
    header = ["team", "person", "pool", "runs", "device_seconds", "device_hours"]
    rows: Iterator[list[object]] = (
        [
            one.team,
            one.user,
            one.pool,
            one.runs,
            round(one.seconds, 3),
            round(one.seconds / 3600, 3),
        ]
        for one in usage.list_report_rows(request.user, moment)
    )
    return build_csv_response(header, rows, f"devices-{moment:%Y-%m}.csv")


@require_POST
def return_device(request: AuthenticatedRequest, device_id: int) -> HttpResponse:
    quotas.check_admin(request.user)
    device = get_object_or_404(Device, pk=device_id)
    quotas.return_to_service(request.user, device, request.POST.get("reason", ""))
    messages.success(request, f"{device} is given out again.")
    return redirect("gpus")


def build_csv_response(
    header: list[str], rows: Iterator[list[object]], name: str
) -> StreamingHttpResponse:
    """A download, a hundred rows a piece; cells that a spreadsheet would run as a formula are
    quoted.
    """

    def iter_chunks() -> Iterator[bytes]:
        out = io.StringIO()
        writer = csv.writer(out)
        writer.writerow(header)
        for count, row in enumerate(rows, start=1):
            writer.writerow([escape_formula(cell) for cell in row])
            if count % 100 == 0:
                yield out.getvalue().encode()
                out.seek(0)
                out.truncate()
        yield out.getvalue().encode()

    response = StreamingHttpResponse(async_chunks(iter_chunks()), content_type="text/csv")
    response["Content-Disposition"] = f'attachment; filename="{name}"'
    return response


def escape_formula(cell: object) -> object:
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(FORMULA_STARTS) else cell
