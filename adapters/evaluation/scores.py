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

from training.runs.metrics.comparison import flat


@dataclass(frozen=True)
class Metric:
    title: str
    words: str
    better: str  # "high" or "low"
    unit: str  # "share" is shown as a percentage
    counts: bool  # 0 or 1 a row: two versions are told apart by McNemar's exact test


METRICS: dict[str, Metric] = {
    "exact": Metric(
        "Exact match",
        "The reply is the expected answer, to the character.",
        "high",
        unit="share",
        counts=True,
    ),
    "normalised": Metric(
        "Normalised match",
        "The same without case, punctuation, articles and blanks (SQuAD's rule).",
        "high",
        unit="share",
        counts=True,
    ),
    "rouge_l": Metric(
        "ROUGE-L", "Longest common sequence of words, F1.", "high", unit="share", counts=False
    ),
    "chrf": Metric(
        "chrF", "Common pieces of up to six characters.", "high", unit="share", counts=False
    ),
    "json_valid": Metric(
        "Valid JSON",
        "The reply can be read as JSON, where JSON is expected.",
        "high",
        unit="share",
        counts=True,
    ),
    "fields": Metric(
        "Fields right",
        "Share of the expected JSON's fields with the expected value.",
        "high",
        unit="share",
        counts=False,
    ),
    "perplexity": Metric(
        "Perplexity of the answer",
        "How surprised the version is by the expected answer; 1 is not at all.",
        "low",
        unit="choices/token",
        counts=False,
    ),
}


def scores_of(reply: str, expected: str) -> dict[str, float]:
    """All that can be told from two texts. Without an expected answer there is nothing to tell."""
    if not expected.strip():
        return {}
    return {
        "exact": float(reply.strip() == expected.strip()),
        "normalised": float(normalised(reply) == normalised(expected)),
        "rouge_l": rouge().score(expected, reply)["rougeL"].fmeasure,
        "chrf": chrf().sentence_score(reply, [expected]).score / 100,
        **json_scores(reply, expected),
    }


def normalised(text: str) -> str:
    """SQuAD's: lower case, no punctuation, no articles, single blanks (Rajpurkar et al. 2016)."""
    bare = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def json_scores(reply: str, expected: str) -> dict[str, float]:
    """Only where an object or a list is expected: a bare number or word is no question of JSON."""
    wanted = read_json(expected)
    if not isinstance(wanted, dict | list):
        return {}
    said = read_json(reply)
    if not isinstance(said, dict | list):
        return {"json_valid": 0.0, "fields": 0.0}
    right, got = flat({"": wanted}), flat({"": said})
    return {
        "json_valid": 1.0,
        "fields": sum(name in got and got[name] == value for name, value in right.items())
        / max(1, len(right)),
    }


def read_json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


@cache
def rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=False)


@cache
def chrf() -> Any:
    from sacrebleu.metrics import CHRF

    return CHRF()


def mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def disagreement(replies: Sequence[str]) -> float:
    """0 when all say the same, 1 when each says something else."""
    if len(replies) < 2:
        return 0.0
    return (len({normalised(reply) for reply in replies}) - 1) / (len(replies) - 1)
