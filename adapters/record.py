"""What was true when a version was made: the record that stays with it when run and data are gone. Read only, no torch."""

from __future__ import annotations

from typing import Any

from django.utils import timezone

from training.gpus.models import Allocation
from training.runs.models import Run
from training.runs.state_words import figures_of


def record_of(run: Run) -> dict[str, Any]:
    """Units: seconds, bytes."""
    return {
        "settings": run.config,
        "seed": run.config.get("seed"),
        "base": {"name": run.base_model.name, "revision": run.base_model.revision, "source": run.base_model.source},
        "data": {
            "name": str(run.data),
            "digest": run.data.digest,
            "train_rows": run.data.train_rows,
            "heldout_rows": run.data.heldout_rows,
        },
        "versions": run.plan.get("versions", {}),
        "device": run.plan.get("device", ""),
        "precision": run.plan.get("precision", ""),
        "figures": {**figures_of(run), "train_seconds": seconds_since_start(run)},
        "forecast_bytes": run.forecast.get("peak"),
        "device_seconds": device_seconds(run),
        "run": {"id": run.pk, "name": run.name},
    }


def seconds_since_start(run: Run) -> float | None:
    """A run that is just ending has no end yet."""
    return ((run.finished_at or timezone.now()) - run.started_at).total_seconds() if run.started_at else None


def device_seconds(run: Run) -> float:
    """How long it has held devices, all together."""
    held = Allocation.objects.filter(run_id=run.pk).values_list("started_at", "released_at")
    now = timezone.now()
    return sum(((released or now) - started).total_seconds() for started, released in held)
