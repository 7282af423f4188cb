"""Figures of versions for the comparison: quality and cost, and whether high or low is better
(training/runs/metrics/comparison.py has those of runs).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from adapters.evaluation.scores import METRICS, mean_or_none
from adapters.evaluation.significance import Contender
from adapters.models import AdapterVersion, Reply
from training.engine import metrics
from training.engine.metrics import Figure

FIGURES: tuple[Figure, ...] = (
    metrics.METRICS["eval_loss"],
    Figure("exact_match", "Exact match at the end of the run", "share", "high"),
    *(
        Figure(f"mean_{name}", score.title, score.unit, score.better, decimals=2)
        for name, score in METRICS.items()
    ),
    Figure("trainable_parameters", "Trainable parameters", better="low"),
    Figure("size_bytes", "File size", "bytes", "low", 1),
    Figure("forecast_bytes", "Peak memory (forecast)", "bytes", "low", 1),
    Figure("peak_memory_bytes", "Peak memory (measured)", "bytes", "low", 1),
    Figure("tokens_per_second", "Tokens per second (training)", "tokens/s", "high"),
    Figure("answer_rate", "Tokens per second (inference)", "tokens/s", "high", 1),
    Figure("device_seconds", "Device time", "seconds", "low"),
    Figure("step", "Step"),
)


def build_figures(version: AdapterVersion, replies: Sequence[Reply]) -> dict[str, Any]:
    """The values for FIGURES. Units: bytes, seconds, tokens per second; losses in nats per token;
    `mean_*` over the scored replies.
    """
    run_figures = version.provenance.get("figures", {})
    scored = {
        name: [reply.scores[name] for reply in replies if name in reply.scores] for name in METRICS
    }
    return {
        "base": version.base_model_id,
        "eval_loss": version.eval_loss,
        "exact_match": version.exact_match,
        **{f"mean_{name}": mean_or_none(values) for name, values in scored.items()},
        "trainable_parameters": version.trainable_parameters or None,
        "size_bytes": version.size_bytes,
        "forecast_bytes": version.provenance.get("forecast_bytes"),
        "peak_memory_bytes": run_figures.get("peak_memory_bytes"),
        "tokens_per_second": run_figures.get("tokens_per_second"),
        "answer_rate": get_answer_rate(replies),
        "device_seconds": version.provenance.get("device_seconds"),
        "step": version.step,
    }


def get_answer_rate(replies: Sequence[Reply]) -> float | None:
    """Tokens per second while answering eight rows concurrently."""
    seconds = sum(reply.seconds for reply in replies)
    return sum(reply.tokens for reply in replies) / seconds if seconds else None


def build_contender(version: AdapterVersion, replies: Sequence[Reply]) -> Contender:
    return Contender(
        name=str(version),
        rows={reply.row: reply.scores for reply in replies},
        base=version.base_model_id,
        size_bytes=version.size_bytes,
        tokens_per_second=get_answer_rate(replies),
    )


def get_comparison_settings(version: AdapterVersion) -> dict[str, Any]:
    """How a version was made, as nested settings for the table of differences."""
    provenance = version.provenance
    data, base = provenance.get("data", {}), provenance.get("base", {})
    return {
        "base": base.get("name", version.base_model.name),
        "base revision": base.get("revision"),
        "data": data.get("name"),
        "data rows": data.get("train_rows"),
        "method": version.method,
        "from step": version.step,
        **provenance.get("settings", {}),
        "device": provenance.get("device"),
        "precision used": provenance.get("precision"),
        "libraries": provenance.get("versions", {}),
    }
