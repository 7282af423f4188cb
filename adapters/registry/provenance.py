"""Provenance of an adapter version: how it was made, stored with it so that it outlives run and
data.
"""

from __future__ import annotations

from typing import Any

from training.gpus.ledger import get_run_seconds
from training.runs.models import Run
from training.runs.status import get_comparison_figures


def build_provenance(run: Run, step: int) -> dict[str, Any]:
    """The provenance of a run at one of its steps. Units: seconds, bytes. The device time is
    prorated by step.
    """
    fraction = min(1.0, step / run.step) if run.step else 1.0
    return {
        "settings": run.config,
        "seed": run.config.get("seed"),
        "base": {
            "name": run.base_model.name,
            "revision": run.base_model.revision,
            "source": run.base_model.source,
        },
        "data": {
            "name": str(run.data),
            "digest": run.data.digest,
            "train_rows": run.data.train_rows,
            "eval_rows": run.data.eval_rows,
        },
        "versions": run.start_info.get("versions", {}),
        "device": run.start_info.get("device", ""),
        "precision": run.start_info.get("precision", ""),
        "figures": {
            name: value
            for name, value in get_comparison_figures(run).items()
            if name not in ("base", "device_seconds")
        },
        "forecast_bytes": run.forecast.get("peak"),
        "device_seconds": fraction * get_run_seconds(run.pk),
        "run": {"id": run.pk, "name": run.name},
    }
