"""Every number that a run reports at each step or measurement, one row each. Journal, curves,
tables, exports and charts read this table, so that a new metric is one row here and its value where
the step is taken.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Figure:
    """A number with a title that tables show; `better` is "low", "high", or "" for neither."""

    name: str
    title: str
    unit: str = ""
    better: str = ""
    decimals: int = 0

    @property
    def is_per_token(self) -> bool:
        """A token of another base model is another piece of text: not to be compared across."""
        return self.unit.endswith("/token")


@dataclass(frozen=True)
class Metric(Figure):
    """A figure over the steps. `event` is the kind of event that brings it, `chart` the row of the
    run page's chart that draws it in `color` (a variable of variables.css). What has no chart is
    stored for the event stream alone; of a measurement it stands in tables and exports, too.
    """

    chart: str = ""
    event: str = "step"
    color: str = "chart-1"
    label: str = ""  # in the chart's legend, where a title is too long at 390 px


NATS_PER_TOKEN = "nats/token"
METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("loss", "Training loss", NATS_PER_TOKEN, "low", 3, chart="Loss", label="train"),
        Metric("learning_rate", "Learning rate", decimals=6, chart="Learning rate"),
        Metric("gradient_norm", "Gradient norm", decimals=3, chart="Gradient norm"),
        Metric("tokens", "Tokens of the step", "tokens"),
        Metric("trained_tokens", "Trained tokens of the step", "tokens"),
        Metric("total_tokens", "Tokens so far", "tokens"),
        Metric("tokens_per_second", "Tokens per second", "tokens/s", "high", chart="Tokens/s"),
        Metric("seconds", "Time of the step", "seconds", "low"),
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
            NATS_PER_TOKEN,
            "low",
            3,
            chart="Loss",
            event="eval",
            color="chart-2",
            label="held-out",
        ),
        # exp(loss): among how many equally likely tokens the model chooses
        Metric("perplexity", "Perplexity", "choices/token", "low", 3, event="eval"),
    )
}


def get_metric_names(event: str) -> list[str]:
    """The metrics that an event of this kind brings."""
    return [metric.name for metric in METRICS.values() if metric.event == event]


def get_charted_names() -> list[str]:
    """The metrics of a step that have a curve."""
    return [m.name for m in METRICS.values() if m.event == "step" and m.chart]


def metrics_as_dicts() -> list[dict[str, Any]]:
    """The table as the scripts of a page read it."""
    return [asdict(metric) for metric in METRICS.values()]
