"""The metrics that a run reports at each step or evaluation. The journal, curves, tables, exports
and charts read this table, so a new metric needs one row here and its value in the training loop.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Figure:
    """A number with a title for tables. `better` is "low", "high", or "" if neither is better."""

    name: str
    title: str
    unit: str = ""
    better: str = ""
    decimals: int = 0

    @property
    def is_per_token(self) -> bool:
        """Base models tokenize text differently, so such a figure is not comparable across them."""
        return self.unit.endswith("/token")


@dataclass(frozen=True)
class Metric(Figure):
    """A figure with a value for each step or evaluation. `event` is the kind of event that contains
    it, `chart` the row of the run page's chart that shows it, in `color` (a variable of
    variables.css). A step metric without a chart is only in the event stream; an evaluation metric
    without one is in tables and exports, too.
    """

    chart: str = ""
    event: str = "step"
    color: str = "chart-1"
    label: str = ""  # for the chart's legend, where the title is too long on narrow screens


LOSS_UNIT = "nats/token"
METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("loss", "Training loss", LOSS_UNIT, "low", 3, chart="Loss", label="train"),
        Metric("learning_rate", "Learning rate", decimals=6, chart="Learning rate"),
        Metric("gradient_norm", "Gradient norm", decimals=3, chart="Gradient norm"),
        Metric("tokens", "Tokens per step", "tokens"),
        Metric("trained_tokens", "Trained tokens per step", "tokens"),
        Metric("total_tokens", "Total tokens", "tokens"),
        Metric("tokens_per_second", "Tokens per second", "tokens/s", "high", chart="Tokens/s"),
        Metric("seconds", "Step time", "seconds", "low"),
        Metric(
            "memory_bytes",
            "Memory",
            "bytes",
            "low",
            1,
            chart="Memory",
            color="chart-3",
            label="now",
        ),
        Metric(
            "memory_peak_bytes",
            "Peak memory",
            "bytes",
            "low",
            1,
            chart="Memory",
            color="chart-5",
            label="peak",
        ),
        Metric(
            "eval_loss",
            "Held-out loss",
            LOSS_UNIT,
            "low",
            3,
            chart="Loss",
            event="eval",
            color="chart-2",
            label="held-out",
        ),
        # exp(eval_loss): the number of equally likely tokens with the same loss
        Metric("perplexity", "Perplexity", "choices/token", "low", 3, event="eval"),
    )
}


def get_metric_names(event: str) -> list[str]:
    """Return the names of the metrics in events of this kind."""
    return [metric.name for metric in METRICS.values() if metric.event == event]


def get_charted_names() -> list[str]:
    """Return the names of the step metrics that have a chart."""
    return [m.name for m in METRICS.values() if m.event == "step" and m.chart]


def metrics_as_dicts() -> list[dict[str, Any]]:
    """Return the metrics as JSON for the scripts of a page."""
    return [asdict(metric) for metric in METRICS.values()]
