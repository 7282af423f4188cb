"""The grid of answers: rows are prompts, columns a base and versions. Rows in, cells out; it asks
nobody and knows no request.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

from adapters.evaluation.scores import METRICS, disagreement

Marked = list[tuple[str, bool]]
MOST_WORDS = 400  # of a reply in which differences are looked for: the search is quadratic
ROWS_A_PAGE = 25


@dataclass(frozen=True)
class Cell:
    """A reply as pieces of text, each with whether it differs from what is expected, and its
    scores.
    """

    pieces: Marked
    scores: dict[str, float]
    empty: bool = False


@dataclass(frozen=True)
class Line:
    row: int
    messages: list[dict[str, str]]
    expected: str
    cells: list[Cell | None]
    disagreement: float


def lines_of(
    rows: Sequence[dict[str, Any]],
    replies: Sequence[Mapping[int, Any]],
    order: str,
    *,
    page: int = 1,
) -> list[Line]:
    """A page of lines in the order wanted: `row`, `disagreement`, or `worst-K` (the worst of column
    K by its first score) first.

    `replies`: a column each, by row; a reply has `text` and `scores`.
    """
    numbers = list(range(len(rows)))
    if order == "disagreement":
        apart = {
            place: disagreement([column[place].text for column in replies if place in column])
            for place in numbers
        }
        numbers.sort(key=lambda place: -apart[place])
    elif (
        order.startswith("worst-")
        and order[6:].isdecimal()
        and len(order) < 10
        and int(order[6:]) < len(replies)
    ):
        column = replies[int(order[6:])]
        numbers.sort(
            key=lambda place: badness(column[place].scores) if place in column else -1.0,
            reverse=True,
        )
    start = (page - 1) * ROWS_A_PAGE
    return [line_of(place, rows[place], replies) for place in numbers[start : start + ROWS_A_PAGE]]


def badness(scores: Mapping[str, float]) -> float:
    """Bigger is worse: what a row lacks of all its shares, and a little of its surprise where those
    are equal.
    """
    shares = [
        1 - scores[name]
        for name, metric in METRICS.items()
        if metric.unit == "share" and name in scores
    ]
    surprise = 1 - 1 / max(1.0, scores.get("perplexity", 1.0))
    return sum(shares) + 1e-3 * surprise


def line_of(place: int, row: dict[str, Any], replies: Sequence[Mapping[int, Any]]) -> Line:
    said = [column.get(place) for column in replies]
    first = next((reply.text for reply in said if reply is not None), "")
    against = row["expected"] or first
    cells = [
        None if reply is None else Cell(marked(reply.text, against), reply.scores, not reply.text)
        for reply in said
    ]
    apart = disagreement([reply.text for reply in said if reply is not None])
    return Line(place, row["messages"], row["expected"], cells, apart)


def marked(text: str, against: str) -> Marked:
    """The text in pieces; those that do not stand in `against` at this place are marked."""
    ours, theirs = words(text), words(against)
    if len(ours) > MOST_WORDS or len(theirs) > MOST_WORDS or text == against:
        return [(text, False)] if text else []
    spans = SequenceMatcher(None, theirs, ours, autojunk=False).get_opcodes()
    pieces = [("".join(ours[start:end]), kind != "equal") for kind, _, _, start, end in spans]
    return [piece for piece in pieces if piece[0]]


def words(text: str) -> list[str]:
    return re.findall(r"\w+|\s+|[^\w\s]", text)
