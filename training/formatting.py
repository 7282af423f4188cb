"""Formats numbers for people: bytes, times, counts, shares. A missing value is an empty string.

static/js/formatting.js is its twin for values that a page updates itself;
tests/site/formatting_cases.json holds the test cases of both.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

DASH = "\N{EN DASH}"


def format_bytes(count: float | None, decimals: int = 1) -> str:
    """14_900_000_000 as `14.9 GB`: powers of 1,000, as device makers and `df -H` count."""
    if not isinstance(count, int | float):
        return ""
    for unit in ("B", "kB"):
        if abs(round(count)) < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    for unit in ("MB", "GB"):
        if abs(round(count, decimals)) < 1000:
            return f"{count:.{decimals}f} {unit}"
        count /= 1000
    return f"{count:.{decimals}f} TB"


def format_binary_bytes(count: int) -> str:
    """A limit that is set in powers of 1,024: `512 MiB`, `2 GiB`."""
    return f"{count / 2**30:g} GiB" if count >= 2**30 else f"{count / 2**20:g} MiB"


def format_count(count: float | None) -> str:
    """134515008 as `134.5M`."""
    if not isinstance(count, int | float):
        return ""
    for unit in ("", "k", "M", "B"):
        if abs(count) < 1000:
            return f"{count:.0f}{unit}" if not unit else f"{count:.1f}{unit}"
        count /= 1000
    return f"{count:.1f}T"


def format_integer(count: float) -> str:
    """1234567 as `1,234,567`."""
    return f"{count:,.0f}"


def format_percent(fraction: float | None) -> str:
    """0.0312 as `3.1%`."""
    return f"{100 * fraction:.1f}%" if isinstance(fraction, int | float) else ""


def format_loss(loss: float | None) -> str:
    return "" if loss is None else f"{loss:.3f}"


def format_setting(value: Any) -> str:
    """A setting's value for use in a sentence: `on`, `1,024`, `2e-4`."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float) and 0 < value < 0.01:
        digits, exponent = f"{value:e}".split("e")
        return f"{digits.rstrip('0').rstrip('.')}e{int(exponent)}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def format_value(value: float | None, unit: str, decimals: int) -> str:
    """A cell in a table of metrics, by the unit of the metric."""
    if value is None:
        return DASH
    if unit == "bytes":
        return format_bytes(value, decimals)
    if unit == "seconds":
        return format_duration(value)
    return format_percent(value) if unit == "share" else f"{value:,.{decimals}f}"


def format_duration(seconds: float | None) -> str:
    """3725 as `1 h 2 min`."""
    if seconds is None:
        return ""
    if round(seconds) < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def format_clock(epoch_seconds: float) -> str:
    """`14:03:27` (UTC)."""
    return datetime.fromtimestamp(epoch_seconds, tz=UTC).strftime("%H:%M:%S")


def format_ago(moment: datetime) -> str:
    """`3 minutes ago`, with one unit."""
    # imported late: the child programs format bytes and load no Django
    from django.utils.timesince import timesince

    text = timesince(moment).split(",", maxsplit=1)[0]
    return "just now" if text.startswith("0") else f"{text} ago"


def format_delay(seconds: float | None) -> str:
    """Seconds from now as `now` or `in 10 min`; None is a run that does not start in the what-if
    simulation.
    """
    if seconds is None:
        return "would not start"
    return "now" if seconds < 1 else f"in {format_duration(seconds)}"


def format_start(earliest: float | None, latest: float | None, now: float) -> str:
    """The estimated start of a queued run: `in 10 to 25 min`, `not before 2 h`, `unknown`.

    All three arguments are epoch seconds; None is unknown.
    """
    unknown = "unknown"
    if earliest is None:
        return unknown
    soon = max(0.0, earliest - now)
    if latest is None:
        return f"not before {format_duration(soon)}" if soon > 60 else unknown
    late = max(soon, latest - now)
    if late < 60:
        return "within a minute"
    first, last = format_duration(soon), format_duration(late)
    number, unit = first.split(" ", 1)
    return f"in {number if last.split(' ', 1)[1] == unit else first} to {last}"
