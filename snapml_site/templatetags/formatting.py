"""Template filters that format numbers; the formats are defined in training/formatting.py."""

from __future__ import annotations

import time
from typing import Any

from django import template
from django.contrib.humanize.templatetags.humanize import intcomma
from django.utils.html import format_html, format_html_join
from django.utils.safestring import SafeString, mark_safe

from training import formatting
from training.engine.methods import METHODS
from training.engine.metrics import Figure

register = template.Library()
register.filter("size", formatting.format_bytes)
register.filter("percent", formatting.format_percent)
register.filter("short_count", formatting.format_count)
register.filter("loss", formatting.format_loss)
register.filter("duration", formatting.format_duration)
register.filter("ago", formatting.format_ago)
register.filter("clock", formatting.format_clock)
register.filter("in_time", formatting.format_delay)

EMPTY_REPLY = mark_safe('<span class="soft">(empty)</span>')
COLUMN_TITLES = {"progress": "Progress", "eval_loss": "Best held-out loss", "memory": "Peak memory"}


@register.filter
def column_title(name: str) -> str:
    return COLUMN_TITLES.get(name, name.capitalize())


@register.filter
def method_title(name: str) -> str:
    return METHODS[name].title if name in METHODS else name


@register.filter("figure")
def format_figure(value: float | None, metric: Figure) -> str:
    return formatting.format_value(value, metric.unit, metric.decimals)


@register.filter("when")
def format_start_range(queue_info: dict[str, Any]) -> str:
    """The estimated start of a queued run, relative to now."""
    if not queue_info:
        return ""
    return formatting.format_start(
        queue_info.get("earliest"), queue_info.get("latest"), time.time()
    )


@register.filter
def sparkline(points: list[float]) -> str | SafeString:
    """A loss curve as a small SVG of 90 x 24 pixels."""
    if len(points) < 2:
        return ""
    low, high = min(points), max(points)
    span = (high - low) or 1
    coordinates = " ".join(
        f"{90 * i / (len(points) - 1):.1f},{22 - 20 * (p - low) / span:.1f}"
        for i, p in enumerate(points)
    )
    return format_html(
        '<svg class="spark" viewBox="0 0 90 24" width="90" height="24" role="img" '
        'aria-label="loss from {} to {}">'
        '<polyline points="{}"/></svg>',
        f"{points[0]:.2f}",
        f"{points[-1]:.2f}",
        coordinates,
    )


@register.filter("reply_html")
def format_reply(cell: Any) -> SafeString:
    """A reply of the table of answers (`answer_table.Cell`), with its differences marked."""
    pieces = format_html_join(
        "",
        "{}",
        (
            (format_html("<mark>{}</mark>", text) if differs else text,)
            for text, differs in cell.pieces
        ),
    )
    return pieces + EMPTY_REPLY if cell.is_empty else pieces


@register.filter("token_spans")
def format_token_spans(row: dict[str, Any]) -> SafeString:
    """The tokens of a row (`engine.data.preview`), and how many are not shown."""
    spans = format_html_join(
        "",
        '<span class="{}">{}</span>',
        (
            (span["kind"], format_html_join("", "<span>{}</span>", ((t,) for t in span["tokens"])))
            for span in row["spans"]
        ),
    )
    if not row.get("more"):
        return spans
    return spans + format_html('<span class="soft"> … {} more</span>', intcomma(row["more"]))


@register.filter
def log_line(event: Any) -> str:
    """An event as a line of the log. Control characters are removed, so that one event cannot look
    like two lines.
    """
    fields = event.fields
    if event.kind == "log":
        text = str(fields.get("text", ""))
    else:
        fields = {"step": event.step, **fields} if event.step is not None else fields
        text = f"{event.kind} " + ", ".join(
            f"{name} {value}" for name, value in fields.items() if value is not None
        )
    return "".join(c for c in text if c == "\n" or c.isprintable())[:4000]
