"""What the frame around every page shows: the rail, and the strip with one bar per device and the
person's month.
"""

from __future__ import annotations

from typing import Any

from django.http import HttpRequest

from adapters.models import AdapterVersion
from training.datasets.models import Dataset
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
    user = getattr(request, "user", None)
    if not user or not user.is_authenticated:  # a lazy object: isinstance would not do
        return {}
    if request.headers.get("HX-Request") and not request.headers.get("HX-History-Restore-Request"):
        return {}  # a part of a page has no frame: 8 of the 16 queries of a moved slider
    match = request.resolver_match
    name = (match.url_name or "").split("-")[0] if match else ""
    active_page = name if name in ("audit",) else name.rstrip("s") + "s"
    return {
        "rail": build_sidebar(user),
        "here": PARENT_PAGES.get(active_page, active_page),
        **build_status_bar(user),
        **build_onboarding(user),
    }


def build_onboarding(user: User) -> dict[str, Any]:
    """The first run in three steps, with what is done already; nothing once it is dismissed or all
    is done.
    """
    if user.guide_dismissed:
        return {}
    steps = [
        ("Choose data", "datasets", Dataset.objects.visible_to(user).exists()),
        ("Start a run", "run-new", Run.objects.filter(owner=user).exists()),
        ("Try the adapter", "adapters", AdapterVersion.objects.visible_to(user).exists()),
    ]
    return {} if all(done for _, _, done in steps) else {"guide": steps}


def build_sidebar(user: User) -> tuple[tuple[str, str, str], ...]:
    """The rooms that a person may enter; quotas and the audit log are for admins and leads."""
    return (*SIDEBAR_PAGES, *QUOTA_PAGES) if can_view_quotas(user) else SIDEBAR_PAGES


def build_status_bar(user: User) -> dict[str, Any]:
    """A bar for each device that reports, and who is there, if the person may see that run; and the
    person's month.
    """
    run_ids = {
        allocation.device_id: allocation.run_id
        for allocation in Allocation.objects.filter(released_at=None)
    }
    runs = (
        Run.objects.visible_to(user)
        .select_related("owner")
        .only("name", "owner__username")
        .in_bulk(list(run_ids.values()))
    )
    devices = [
        device
        for device in Device.objects.select_related("host")[:MAX_BARS]
        if not is_offline(device.host)
    ]
    bars = [
        {
            "device": device,
            "share": round(100 * device.used_bytes / max(1, device.total_bytes)),
            "holder": runs.get(run_ids.get(device.pk, 0)),
        }
        for device in devices
    ]
    return {"bars": bars, "hours": get_own_hours(user), "ended": get_recently_ended(user)}
