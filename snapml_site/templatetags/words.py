"""Numbers as people read them. The JavaScript twin is static/js/words.js."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from django import template
from django.utils.html import format_html
from django.utils.safestring import SafeString
from django.utils.timesince import timesince

from adapters.evaluation.scores import METRICS

register = template.Library()
SHARES = {f"mean_{name}" for name, metric in METRICS.items() if metric.share} | {"exact_match"}


@register.filter
def size(count: float | None) -> str:
    """Bytes as `14.9 GB`: powers of 1,000, as device makers and `df -H` count."""
    if not isinstance(count, int | float):
        return ""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit in ("B", "kB") else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


@register.filter
def percent(share: float | None) -> str:
    """0.0312 as `3.1 %`."""
    return f"{100 * share:.1f} %" if isinstance(share, int | float) else ""


COLUMN_TITLES = {"progress": "Progress", "heldout": "Best held-out", "memory": "Peak memory"}


@register.filter
def column_title(name: str) -> str:
    return COLUMN_TITLES.get(name, name.capitalize())


@register.filter
def figure(value: Any, name: str) -> str:
    """A figure of a comparison in its unit."""
    if value is None:
        return "\N{EN DASH}"
    return next((tell(value) for fits, tell in UNITS if fits(name)), f"{value:,.0f}")


@register.filter
def short_count(count: float | None) -> str:
    """134515008 as `134.5M`."""
    if not isinstance(count, int | float):
        return ""
    for unit in ("", "k", "M", "B"):
        if abs(count) < 1000:
            return f"{count:.0f}{unit}" if not unit else f"{count:.1f}{unit}"
        count /= 1000
    return f"{count:.1f}T"


@register.filter
def loss(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


@register.filter
def duration(seconds: float | None) -> str:
    """3725 as `1 h 2 min`."""
    if seconds is None:
        return ""
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds // 3600:.0f} h {seconds % 3600 / 60:.0f} min"


@register.filter
def sparkline(points: list[float]) -> str | SafeString:
    """Losses as a small drawing, 90 x 24."""
    if len(points) < 2:
        return ""
    low, high = min(points), max(points)
    span = (high - low) or 1
    places = " ".join(
        f"{90 * i / (len(points) - 1):.1f},{22 - 20 * (p - low) / span:.1f}"
        for i, p in enumerate(points)
    )
    return format_html(
        '<svg class="spark" viewBox="0 0 90 24" width="90" height="24" role="img" '
        'aria-label="loss from {} to {}">'
        '<polyline points="{}"/></svg>',
        f"{points[0]:.2f}",
        f"{points[-1]:.2f}",
        places,
    )


@register.filter
def ago(moment: datetime) -> str:
    """`3 minutes ago`, with one unit."""
    words = timesince(moment).split(",", maxsplit=1)[0]
    return "just now" if words.startswith("0") else f"{words} ago"


@register.filter
def clock(seconds: float) -> str:
    """Epoch seconds as `14:03:27` (UTC)."""
    return datetime.fromtimestamp(seconds, tz=UTC).strftime("%H:%M:%S")


@register.filter
def log_line(event: Any) -> str:
    """An event as a line of the log. Control characters are dropped, so that no line can pose as
    two.
    """
    said = event.payload
    if event.kind == "log":
        text = str(said.get("text", ""))
    else:
        facts = {"step": event.step, **said} if event.step is not None else said
        text = f"{event.kind} " + ", ".join(
            f"{name} {value}" for name, value in facts.items() if value is not None
        )
    return "".join(c for c in text if c == "\n" or c.isprintable())[:4000]


@register.filter
def when(waits: dict[str, Any]) -> str:
    """The range in which a waiting run should start, from now: `in 10 to 25 min`, `not before 2
    h`.
    """
    earliest, latest = waits.get("earliest"), waits.get("latest")
    if earliest is None:
        return "nobody can tell yet" if waits else ""
    now = datetime.now(tz=UTC).timestamp()
    soon = max(0.0, earliest - now)
    if latest is None:
        return f"not before {duration(soon)}" if soon > 60 else "nobody can tell yet"
    late = max(soon, latest - now)
    if late < 60:
        return "within a minute"
    (first, *unit), (_, *other) = duration(soon).split(" ", 1), duration(late).split(" ", 1)
    return f"in {first if unit == other else duration(soon)} to {duration(late)}"


@register.filter
def in_time(seconds: float | None) -> str:
    """Seconds from now: `now`, `in 10 min`; None: nothing that is known would let it."""
    if seconds is None:
        return "not before something else changes"
    return "now" if seconds < 1 else f"in {duration(seconds)}"


# Which figures are told in which unit; the rest are whole numbers.
UNITS: tuple[tuple[Callable[[str], bool], Callable[[Any], str]], ...] = (
    (lambda name: name.endswith("_bytes"), size),
    (lambda name: name.endswith("_seconds"), duration),
    (lambda name: name in SHARES, percent),
    (lambda name: name == "mean_perplexity", "{:.3g}".format),
    (lambda name: name == "answer_rate", "{:,.1f}".format),
    (lambda name: name.endswith("loss") or name == "perplexity", loss),
)
