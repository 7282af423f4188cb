"""What the frame around every page shows: the rail, and the strip with one bar per device."""

from __future__ import annotations

from typing import Any

import psutil
from django.http import HttpRequest

from adapters.models import AdapterVersion
from training.datasets.models import Dataset
from training.people.models import User
from training.runs.models import Run
from training.runs.notices import ended_lately
from training.runs.states import ACTIVE

RAIL = (
    ("runs", "Runs", "M4 19V9m5 10V5m5 14v-7m5 7V8"),
    ("datasets", "Data", "M5 6c0-2 14-2 14 0v12c0 2-14 2-14 0zm0 0c0 2 14 2 14 0M5 12c0 2 14 2 14 0"),
    ("adapters", "Adapters", "M7 4v16M7 8h6a3 3 0 0 1 3 3v9M16 4v4"),
    ("models", "Models", "M12 3l8 4.5v9L12 21l-8-4.5v-9zm0 9l8-4.5M12 12v9M12 12L4 7.5"),
)


BELONGS_TO = {"sweeps": "runs", "uploads": "datasets"}


def frame(request: HttpRequest) -> dict[str, Any]:
    user = getattr(request, "user", None)
    if not user or not user.is_authenticated:  # a lazy object: isinstance would not do
        return {}
    match = request.resolver_match
    here = (match.url_name or "").split("-")[0].rstrip("s") + "s" if match else ""
    return {
        "rail": RAIL,
        "here": BELONGS_TO.get(here, here),
        **strip(user),
        **({} if request.headers.get("HX-Request") else guide(user)),  # fragments, the strip among them, do not show it
    }


def guide(user: User) -> dict[str, Any]:
    """The first run in three steps, with what is done already; nothing once it is dismissed or all is done."""
    if user.guide_dismissed:
        return {}
    steps = [
        ("Choose data", "datasets", Dataset.objects.visible_to(user).exists()),
        ("Start a run", "run-new", Run.objects.filter(owner=user).exists()),
        ("Try the adapter", "adapters", AdapterVersion.objects.visible_to(user).exists()),
    ]
    return {} if all(done for _, _, done in steps) else {"guide": steps}


def strip(user: User) -> dict[str, Any]:
    """This host as one device: memory used and total, and who trains on it, if the person may see that run."""
    memory = psutil.virtual_memory()
    holder = Run.objects.visible_to(user).filter(state__in=ACTIVE).select_related("owner").first()
    return {
        "device": {
            "name": "CPU",
            "used_bytes": memory.total - memory.available,
            "total_bytes": memory.total,
            "share": round(100 * (1 - memory.available / memory.total)),
            "holder": holder,
        },
        "ended": ended_lately(user),
    }
