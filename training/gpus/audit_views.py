"""The audit log, the monthly usage report and their downloads, and the button that returns a dirty
device to its pool.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlencode

from django.contrib import messages
from django.db.models import Q
from django.http import HttpResponse, HttpResponseBase, StreamingHttpResponse
from django.shortcuts import get_object_or_404, redirect, render
from django.views.decorators.http import require_POST, require_safe

from training.gpus import audit as audit_log
from training.gpus import quotas, usage
from training.gpus.models import AuditEntry, Device
from training.people.models import User
from training.people.pagination import paginate
from training.people.permissions import check_admin
from training.people.requests import AuthenticatedRequest, async_chunks

ENTRIES_PER_PAGE = 100
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")


def filter_audit_entries(user: User, action: str = "", text: str = "") -> Any:
    """All entries for admins and those of their own teams for leads, newest first.

    Raises:
        NotAllowed: the user is neither an admin nor a team lead.
    """
    quotas.check_lead_or_admin(user)
    visible_ids = usage.get_visible_team_ids(user)
    rows = (
        AuditEntry.objects.all()
        if visible_ids is None
        else AuditEntry.objects.filter(team__in=visible_ids)
    )
    if action:
        rows = rows.filter(action=action)
    if text:
        rows = rows.filter(
            Q(subject__icontains=text) | Q(actor_name__icontains=text) | Q(reason__icontains=text)
        )
    return rows


@require_safe
def show_audit_log(request: AuthenticatedRequest) -> HttpResponse:
    action, text = request.GET.get("action", "")[:30], request.GET.get("q", "")[:100]
    rows = filter_audit_entries(request.user, action, text)
    is_verified = bool(request.GET.get("check")) and request.user.is_superuser
    values = {
        "page": paginate(request, rows, ENTRIES_PER_PAGE),
        "actions": sorted(
            set(AuditEntry.objects.order_by().values_list("action", flat=True).distinct())
        ),
        "action": action,
        "q": text,
        "list_query": urlencode({"action": action, "q": text}),
        "is_verified": is_verified,
        "altered_entry": audit_log.find_tampered_entry() if is_verified else None,
    }
    return render(request, "gpus/audit.html", values)


@require_safe
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


@require_safe
def download_report(request: AuthenticatedRequest) -> HttpResponseBase:
    """Device-seconds by team, user and pool as CSV, for a month such as `?month=2026-11`."""
    quotas.check_lead_or_admin(request.user)
    text = request.GET.get("month", "")
    moment = usage.parse_month(text)
    header = ["team", "person", "pool", "runs", "device_seconds", "device_hours"]
    rows: Iterator[list[object]] = (
        [
            row.team,
            row.user,
            row.pool,
            row.runs,
            round(row.seconds, 3),
            round(row.seconds / 3600, 3),
        ]
        for row in usage.list_report_rows(request.user, moment)
    )
    return build_csv_response(header, rows, f"devices-{moment:%Y-%m}.csv")


@require_POST
def return_device(request: AuthenticatedRequest, device_id: int) -> HttpResponse:
    check_admin(request.user, quotas.EDIT_QUOTAS)
    device = get_object_or_404(Device, pk=device_id)
    quotas.return_to_service(request.user, device, request.POST.get("reason", ""))
    messages.success(request, f"{device} has been returned to its pool.")
    return redirect("gpus")


def build_csv_response(
    header: list[str], rows: Iterator[list[object]], name: str
) -> StreamingHttpResponse:
    """A CSV download in chunks of 100 rows, safe to open in a spreadsheet."""

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
    """Quote a cell that a spreadsheet would evaluate as a formula."""
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(FORMULA_STARTS) else cell
