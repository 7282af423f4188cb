"""One sentence for two versions that the figures support, or that no difference is shown. Pure.

Rows that count 0 or 1 are told apart by McNemar's exact test (the binomial test of the rows where the two differ), others by
Wilcoxon's signed-rank test; both pair the same prompts. With several pairs on a page the p-values are Holm's (1979).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from adapters.scores import METRICS, mean

SURE = 0.05
FEWEST_ROWS = 10
SAME_SHARE = 0.02  # sizes and speeds closer than this are called the same
SURPRISE = "perplexity"
ORDER = ("exact", "normalised", "fields", "rouge_l", SURPRISE)


@dataclass(frozen=True, kw_only=True)
class Side:
    """A version in a comparison: its name, its scores by row, and what it costs. Units: bytes, tokens a second."""

    name: str
    rows: dict[int, dict[str, float]]
    size_bytes: int = 0
    tokens_per_second: float | None = None


@dataclass(frozen=True)
class Finding:
    first: Side
    second: Side
    metric: str
    rows: int
    means: tuple[float, float]
    p: float


@dataclass(frozen=True)
class Verdict:
    words: str
    sure: bool
    winner: str = ""


def verdicts(sides: Sequence[Side]) -> list[Verdict]:
    """One for each pair, in order: what tells them apart, and how the expected answers surprise them."""
    pairs = list(combinations(sides, 2))
    found = [(finding(pair, ORDER), finding(pair, (SURPRISE,))) for pair in pairs]
    tests = {(place, one.metric): one.p for place, of_pair in enumerate(found) for one in of_pair if one is not None}
    sure_of = dict(zip(tests, holm(list(tests.values())), strict=True))
    told = []
    for place, ((first, second), (main, surprise)) in enumerate(zip(pairs, found, strict=True)):
        if main is None:
            told.append(Verdict(f"{first.name} and {second.name}: too few scored rows in common for a test.", sure=False))
            continue
        verdict = sentence(main, sure_of[place, main.metric])
        if surprise is not None and main.metric != SURPRISE:
            words = f"{verdict.words} {surprise_words(surprise, sure_of[place, SURPRISE])}".strip()
            verdict = Verdict(words, verdict.sure, verdict.winner)
        told.append(verdict)
    return told


def finding(pair: tuple[Side, Side], metrics: Sequence[str]) -> Finding | None:
    """The test of the first metric that tells the two apart; None with fewer than FEWEST_ROWS rows in common."""
    first, second = pair
    last = None
    for metric in metrics:
        rows = [row for row, scores in first.rows.items() if metric in scores and metric in second.rows.get(row, {})]
        if len(rows) < FEWEST_ROWS:
            continue
        ours, theirs = ([side.rows[row][metric] for row in rows] for side in (first, second))
        means = (mean(ours) or 0.0, mean(theirs) or 0.0)
        last = Finding(first, second, metric, len(rows), means, p_value(ours, theirs, counts=METRICS[metric].counts))
        if means[0] != means[1]:
            return last
    return last


def p_value(ours: Sequence[float], theirs: Sequence[float], *, counts: bool) -> float:
    """Two-sided. Rows where both score the same say nothing, in either test."""
    from scipy.stats import binomtest, wilcoxon

    apart = [a - b for a, b in zip(ours, theirs, strict=True) if a != b]
    if not apart:
        return 1.0
    if counts:
        return float(binomtest(sum(d > 0 for d in apart), len(apart)).pvalue)
    return float(wilcoxon(apart).pvalue)


def holm(ps: Sequence[float]) -> list[float]:
    """p-values as if each were the only one: step-down, never smaller than the one before."""
    order = sorted(range(len(ps)), key=lambda place: ps[place])
    adjusted, highest = [0.0] * len(ps), 0.0
    for rank, place in enumerate(order):
        highest = max(highest, min(1.0, ps[place] * (len(ps) - rank)))
        adjusted[place] = highest
    return adjusted


def sentence(found: Finding, p: float) -> Verdict:
    metric = METRICS[found.metric]
    low, high = sorted((found.first, found.second), key=lambda side: found.means[side is found.second])
    better, worse = (high, low) if metric.better == "high" else (low, high)
    best, worst = (found.means[side is found.second] for side in (better, worse))
    figures = f"{shown(best, share=metric.share)} against {shown(worst, share=metric.share)} on {found.rows:,} rows"
    costs = "; ".join(filter(None, (size_words(better, worse), speed_words(better, worse))))
    tail = f"; {costs}" if costs else ""
    named = metric.title if metric.title.isupper() or "-" in metric.title else metric.title[0].lower() + metric.title[1:]
    if p >= SURE:
        return Verdict(
            f"No difference shown between {better.name} and {worse.name}: {named} {figures}, p {p_words(p)}{tail}.", sure=False
        )
    return Verdict(
        f"{better.name} beats {worse.name} on {named}, {figures}, p {p_words(p)}{tail}.", sure=True, winner=better.name
    )


def surprise_words(found: Finding, p: float) -> str:
    """Nothing unless it is sure."""
    if p >= SURE:
        return ""
    low, high = sorted((found.first, found.second), key=lambda side: found.means[side is found.second])
    figures = f"{shown(min(found.means), share=False)} against {shown(max(found.means), share=False)}"
    return f"{low.name} is less surprised by the expected answers than {high.name}: perplexity {figures}, p {p_words(p)}."


def shown(value: float, *, share: bool) -> str:
    return f"{value:.0%}".replace("%", " %") if share else f"{value:.3g}"


def p_words(p: float) -> str:
    return f"= {p:.2g}" if p >= 0.001 else "< 0.001"


def size_words(better: Side, worse: Side) -> str:
    if not better.size_bytes or not worse.size_bytes:
        return ""
    ratio = better.size_bytes / worse.size_bytes
    if abs(ratio - 1) < SAME_SHARE:
        return "same size"
    return f"{ratio:.1f} times the size" if ratio > 1 else f"{1 / ratio:.1f} times smaller"


def speed_words(better: Side, worse: Side) -> str:
    if not better.tokens_per_second or not worse.tokens_per_second:
        return ""
    change = better.tokens_per_second / worse.tokens_per_second - 1
    if abs(change) < SAME_SHARE:
        return "as fast"
    return f"{abs(change):.0%} {'faster' if change > 0 else 'slower'}".replace("%", " %")
