"""Scores of a reply against the expected answer. Pure functions.

ROUGE-L (Lin 2004) is rouge-score's F1 without stemming, chrF (Popović 2015) is sacrebleu's with its
defaults; both from 0 to 1 here.
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from training.runs.metrics.comparison import flatten_dict


@dataclass(frozen=True)
class Metric:
    title: str
    description: str
    better: str  # "high" or "low"
    unit: str  # "share" is shown as a percentage
    is_binary: bool  # 0 or 1 per row: tested with McNemar's exact test


METRICS: dict[str, Metric] = {
    "exact": Metric(
        "Exact match",
        "The reply equals the expected answer.",
        "high",
        unit="share",
        is_binary=True,
    ),
    "normalized": Metric(
        "Normalized match",
        "Equal when case, punctuation, articles and spaces are ignored (as in SQuAD).",
        "high",
        unit="share",
        is_binary=True,
    ),
    "rouge_l": Metric(
        "ROUGE-L",
        "F1 of the longest common subsequence of words.",
        "high",
        unit="share",
        is_binary=False,
    ),
    "chrf": Metric(
        "chrF", "Overlap of character n-grams (up to 6).", "high", unit="share", is_binary=False
    ),
    "json_valid": Metric(
        "Valid JSON",
        "The reply parses as JSON, where JSON is expected.",
        "high",
        unit="share",
        is_binary=True,
    ),
    "fields": Metric(
        "Correct fields",
        "Share of the fields of the expected JSON that have the expected value.",
        "high",
        unit="share",
        is_binary=False,
    ),
    "perplexity": Metric(
        "Perplexity of the expected answer",
        "exp of the mean cross entropy of the expected answer; 1 is the best.",
        "low",
        unit="choices/token",
        is_binary=False,
    ),
}


def compute_scores(reply: str, expected: str) -> dict[str, float]:
    """All scores of a reply; empty without an expected answer."""
    if not expected.strip():
        return {}
    return {
        "exact": float(reply.strip() == expected.strip()),
        "normalized": float(normalize_text(reply) == normalize_text(expected)),
        "rouge_l": get_rouge_scorer().score(expected, reply)["rougeL"].fmeasure,
        "chrf": get_chrf_scorer().sentence_score(reply, [expected]).score / 100,
        **compute_json_scores(reply, expected),
    }


def normalize_text(text: str) -> str:
    """SQuAD's normalization: lowercase, no punctuation, no articles, single spaces (Rajpurkar et
    al. 2016).
    """
    without_punctuation = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", without_punctuation).split())


def compute_json_scores(reply: str, expected: str) -> dict[str, float]:
    """Empty unless the expected answer is a JSON object or array: a bare number or word also parses
    as JSON.
    """
    expected_value = parse_json(expected)
    if not isinstance(expected_value, dict | list):
        return {}
    reply_value = parse_json(reply)
    if not isinstance(reply_value, dict | list):
        return {"json_valid": 0.0, "fields": 0.0}
    expected_fields, reply_fields = (
        flatten_dict({"": expected_value}),
        flatten_dict({"": reply_value}),
    )
    return {
        "json_valid": 1.0,
        "fields": sum(
            name in reply_fields and reply_fields[name] == value
            for name, value in expected_fields.items()
        )
        / max(1, len(expected_fields)),
    }


def parse_json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


@cache
def get_rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=False)


@cache
def get_chrf_scorer() -> Any:
    from sacrebleu.metrics import CHRF

    return CHRF()


def mean_or_none(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def compute_disagreement(replies: Sequence[str]) -> float:
    """0 when all replies are the same, 1 when all differ."""
    if len(replies) < 2:
        return 0.0
    return (len({normalize_text(reply) for reply in replies}) - 1) / (len(replies) - 1)
