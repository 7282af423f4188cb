"""How a reply scores against what is expected, and what a comparison makes of it. Pure; the
published metrics are libraries'.

ROUGE-L (Lin 2004) is rouge-score's F1 without stemming, chrF (Popović 2015) sacrebleu's with its
defaults, both from 0 to 1 here.
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from training.runs.metrics.comparison import flatten_settings


@dataclass(frozen=True)
class Metric:
    title: str
    description: str
    better: str  # "high" or "low"
    unit: str  # "share" is shown as a percentage
    is_binary: bool  # 0 or 1 a row: two versions are told apart by McNemar's exact test


METRICS: dict[str, Metric] = {
    "exact": Metric(
        "Exact match",
        "The reply is the expected answer, to the character.",
        "high",
        unit="share",
        is_binary=True,
    ),
    "normalized": Metric(
        "Normalised match",
        "The same without case, punctuation, articles and blanks (SQuAD's rule).",
        "high",
        unit="share",
        is_binary=True,
    ),
    "rouge_l": Metric(
        "ROUGE-L", "Longest common sequence of words, F1.", "high", unit="share", is_binary=False
    ),
    "chrf": Metric(
        "chrF", "Common pieces of up to six characters.", "high", unit="share", is_binary=False
    ),
    "json_valid": Metric(
        "Valid JSON",
        "The reply can be read as JSON, where JSON is expected.",
        "high",
        unit="share",
        is_binary=True,
    ),
    "fields": Metric(
        "Fields right",
        "Share of the expected JSON's fields with the expected value.",
        "high",
        unit="share",
        is_binary=False,
    ),
    "perplexity": Metric(
        "Perplexity of the answer",
        "How surprised the version is by the expected answer; 1 is not at all.",
        "low",
        unit="choices/token",
        is_binary=False,
    ),
}


def compute_scores(reply: str, expected: str) -> dict[str, float]:
    """All that can be told from two texts. Without an expected answer there is nothing to tell."""
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
    """SQuAD's: lower case, no punctuation, no articles, single blanks (Rajpurkar et al. 2016)."""
    without_punctuation = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", without_punctuation).split())


def compute_json_scores(reply: str, expected: str) -> dict[str, float]:
    """Only where an object or a list is expected: a bare number or word is no question of JSON."""
    expected_value = parse_json(expected)
    if not isinstance(expected_value, dict | list):
        return {}
    reply_value = parse_json(reply)
    if not isinstance(reply_value, dict | list):
        return {"json_valid": 0.0, "fields": 0.0}
    expected_fields, reply_fields = (
        flatten_settings({"": expected_value}),
        flatten_settings({"": reply_value}),
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
    """0 when all say the same, 1 when each says something else."""
    if len(replies) < 2:
        return 0.0
    return (len({normalize_text(reply) for reply in replies}) - 1) / (len(replies) - 1)
