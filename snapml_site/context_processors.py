"""Template context of the base layout: the sidebar, the status bar with one bar per device, and the
onboarding steps.
"""

from __future__ import annotations

from typing import Any

from django.http import HttpRequest

from adapters.models import AdapterVersion
from training.datasets.models import Dataset
from training.formatting import format_bytes
from training.gpus.devices import is_offline
from training.gpus.models import Allocation, Device
from training.gpus.usage import can_view_quotas, get_own_hours
from training.people.models import User
from training.runs.models import Run
from training.runs.notifications import get_recently_ended

MAX_BARS = 8

SIDEBAR_PAGES = (
    ("runs", "Runs", "M4 19V9m5 10V5m5 14v-7m5 7V8"),
    (
        "datasets",
        "Data",
        "M5 6c0-2 14-2 14 0v12c0 2-14 2-14 0zm0 0c0 2 14 2 14 0M5 12c0 2 14 2 14 0",
    ),
    ("adapters", "Adapters", "M7 4v16M7 8h6a3 3 0 0 1 3 3v9M16 4v4"),
    ("models", "Models", "M12 3l8 4.5v9L12 21l-8-4.5v-9zm0 9l8-4.5M12 12v9M12 12L4 7.5"),
    ("gpus", "GPUs", "M7 7h10v10H7zM9 3v4m6-4v4M9 17v4m6-4v4M3 9h4m-4 6h4M17 9h4m-4 6h4"),
)
QUOTA_PAGES = (
    ("quotas", "Quotas", "M12 3a9 9 0 1 0 9 9h-9z M15 3.5A9 9 0 0 1 20.5 9H15z"),
    ("audit", "Audit", "M6 3h9l4 4v14H6zM9 11h7m-7 4h7"),
)


PARENT_PAGES = {
    "sweeps": "runs",
    "uploads": "datasets",
    "deployments": "adapters",
    "benchmarks": "adapters",
}


def layout(request: HttpRequest) -> dict[str, Any]:
    """Context processor of the base layout; empty for fragments that htmx requests."""
    user = getattr(request, "user", None)
    if not user or not user.is_authenticated:  # SimpleLazyObject: isinstance does not work
        return {}
    if request.headers.get("HX-Request") and not request.headers.get("HX-History-Restore-Request"):
        return {}  # fragments have no layout; this saves 8 of 16 queries when a slider moves
    match = request.resolver_match
    name = (match.url_name or "").split("-")[0] if match else ""
    active_page = name if name in ("audit",) else name.rstrip("s") + "s"
    return {
        "sidebar": build_sidebar(user),
        "active_page": PARENT_PAGES.get(active_page, active_page),
        **build_status_bar(user),
        **build_onboarding(user),
    }


def build_onboarding(user: User) -> dict[str, Any]:
    """The three steps to the first run and which are done. Empty if the user dismissed them or all
    are done.
    """
    if user.guide_dismissed:
        return {}
    steps = [
        ("Choose data", "datasets", Dataset.objects.visible_to(user).exists()),
        ("Start a run", "run-new", Run.objects.filter(owner=user).exists()),
        ("Try the adapter", "adapters", AdapterVersion.objects.visible_to(user).exists()),
    ]
    return {} if all(done for _, _, done in steps) else {"onboarding_steps": steps}


def build_sidebar(user: User) -> tuple[tuple[str, str, str], ...]:
    """The pages of the sidebar. Only admins and team leads see quotas and the audit log."""
    return (*SIDEBAR_PAGES, *QUOTA_PAGES) if can_view_quotas(user) else SIDEBAR_PAGES


def build_status_bar(user: User) -> dict[str, Any]:
    """A bar for each online device, with the run on it if the user may see that run, and the user's
    device-hours of this month.
    """
    devices = [
        device
        for device in Device.objects.select_related("host")[:MAX_BARS]
        if not is_offline(device.host)
    ]
    run_ids = dict(
        Allocation.objects.filter(released_at=None, device__in=devices).values_list(
            "device", "run_id"
        )
    )
    runs = (
        Run.objects.visible_to(user)
        .select_related("owner")
        .only("name", "owner__username")
        .in_bulk(list(run_ids.values()))
    )
    bars = [build_device_bar(device, runs.get(run_ids.get(device.pk, 0))) for device in devices]
    return {"bars": bars, "hours": get_own_hours(user), "ended": get_recently_ended(user)}


def build_device_bar(device: Device, run: Run | None) -> dict[str, Any]:
    used, total = format_bytes(device.used_bytes), format_bytes(device.total_bytes)
    title = f"{device}, {device.name}: {used} of {total}"
    if run is not None:
        title += f"; {run.owner.username}: {run.name}"
    return {
        "device": device,
        "title": title,
        "share": round(100 * device.used_bytes / max(1, device.total_bytes)),
        "run": run,
    }
