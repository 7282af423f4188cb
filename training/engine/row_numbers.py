"""Row numbers as a text with ranges: `3, 17-20`. Numbers start at 1 and ascend."""

from __future__ import annotations

import re
from collections.abc import Iterable

MAX_CHARACTERS = 20_000
RANGE_PATTERN = re.compile(r"\s*([1-9]\d{0,8})\s*(?:-\s*([1-9]\d{0,8})\s*)?", re.ASCII)


def parse_row_numbers(text: str) -> list[range]:
    """Raises ValueError: not of this form, or not ascending."""
    ranges: list[range] = []
    for part in text.split(",") if text.strip() else []:
        match = RANGE_PATTERN.fullmatch(part)
        if match is None:
            raise ValueError(f"{part.strip()[:40]!r} is not a row number or range")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first or (ranges and first < ranges[-1].stop):
            raise ValueError(f"{part.strip()[:40]!r} is not in ascending order")
        ranges.append(range(first, last + 1))
    return ranges


def list_row_numbers(text: str, rows: int) -> list[int]:
    """The numbers up to `rows`, for a text that was checked."""
    return [
        number
        for numbers in parse_row_numbers(text)
        for number in range(numbers.start, min(numbers.stop, rows + 1))
    ]


def format_row_numbers(numbers: Iterable[int]) -> str:
    """Ascending numbers as a text. Neighbors form a range. Empty if longer than
    MAX_CHARACTERS.
    """
    ranges: list[tuple[int, int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1] = (ranges[-1][0], number)
        else:
            ranges.append((number, number))
    text = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)
    return text if len(text) <= MAX_CHARACTERS else ""
