"""The table of answers: one row per prompt, one column per base model or version. Pure
functions.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

from adapters.evaluation.scores import METRICS, compute_disagreement

DiffPieces = list[tuple[str, bool]]
MAX_DIFF_TOKENS = 400  # longer replies are not compared: the diff is quadratic
ROWS_PER_PAGE = 25


@dataclass(frozen=True)
class Cell:
    """A reply as pieces of text, each with whether it differs from the reference, and
    its scores.
    """

    pieces: DiffPieces
    scores: dict[str, float]
    is_empty: bool = False


@dataclass(frozen=True)
class TableRow:
    """A prompt with its replies, None where there is none yet."""

    row: int
    messages: list[dict[str, str]]
    expected: str
    cells: list[Cell | None]
    disagreement: float


def build_table_rows(
    rows: Sequence[dict[str, Any]],
    replies: Sequence[Mapping[int, Any]],
    order: str,
    *,
    page: int = 1,
) -> list[TableRow]:
    """One page of rows, ordered by `row`, `disagreement`, or `worst-K` (the worst replies of column
    K first).

    `replies` has one mapping per column from row to reply; a reply has `text` and `scores`.
    """
    row_indices = list(range(len(rows)))
    if order == "disagreement":
        disagreements = {
            index: compute_disagreement(
                [column[index].text for column in replies if index in column]
            )
            for index in row_indices
        }
        row_indices.sort(key=lambda index: -disagreements[index])
    elif (
        order.startswith("worst-")
        and order[6:].isdecimal()
        and len(order) < 10
        and int(order[6:]) < len(replies)
    ):
        column = replies[int(order[6:])]
        row_indices.sort(
            key=lambda index: get_error_score(column[index].scores) if index in column else -1.0,
            reverse=True,
        )
    start = (page - 1) * ROWS_PER_PAGE
    return [
        build_table_row(index, rows[index], replies)
        for index in row_indices[start : start + ROWS_PER_PAGE]
    ]


def get_error_score(scores: Mapping[str, float]) -> float:
    """Higher is worse: the sum of what each share lacks to 1, with perplexity as a tiebreaker."""
    errors = [
        1 - scores[name]
        for name, metric in METRICS.items()
        if metric.unit == "share" and name in scores
    ]
    perplexity_error = 1 - 1 / max(1.0, scores.get("perplexity", 1.0))
    return sum(errors) + 1e-3 * perplexity_error


def build_table_row(
    index: int, row: dict[str, Any], replies: Sequence[Mapping[int, Any]]
) -> TableRow:
    row_replies = [column.get(index) for column in replies]
    first = next((reply.text for reply in row_replies if reply is not None), "")
    reference = row["expected"] or first
    cells = [
        None
        if reply is None
        else Cell(diff_text(reply.text, reference), reply.scores, not reply.text)
        for reply in row_replies
    ]
    row_disagreement = compute_disagreement(
        [reply.text for reply in row_replies if reply is not None]
    )
    return TableRow(index, row["messages"], row["expected"], cells, row_disagreement)


def diff_text(text: str, reference: str) -> DiffPieces:
    """Split the text into pieces and flag those that differ from the reference at that position."""
    text_tokens, reference_tokens = split_tokens(text), split_tokens(reference)
    if (
        len(text_tokens) > MAX_DIFF_TOKENS
        or len(reference_tokens) > MAX_DIFF_TOKENS
        or text == reference
    ):
        return [(text, False)] if text else []
    spans = SequenceMatcher(None, reference_tokens, text_tokens, autojunk=False).get_opcodes()
    pieces = [
        ("".join(text_tokens[start:end]), kind != "equal") for kind, _, _, start, end in spans
    ]
    return [piece for piece in pieces if piece[0]]


def split_tokens(text: str) -> list[str]:
    return re.findall(r"\w+|\s+|[^\w\s]", text)
