"""Significance tests between pairs of versions, and a sentence for each result. Pure functions.

Binary scores are tested with McNemar's exact test (the binomial test on the rows where the two
differ), other scores with Wilcoxon's signed-rank test; both pair the same prompts. One metric of
each group is tested. The p-values of all groups and pairs on a page are adjusted with Holm's method
(1979). Perplexities are only compared between versions of the same base model, because they depend
on the tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from adapters.evaluation.scores import METRICS, mean_or_none

ALPHA = 0.05
MIN_ROWS = 10
SAME_TOLERANCE = 0.02  # relative difference below which sizes and speeds count as equal
PERPLEXITY = "perplexity"
METRIC_GROUPS = (("exact", "normalized"), ("fields", "json_valid", "rouge_l", "chrf"))


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A version in a comparison: name, base model, scores by row, and cost. Units: bytes, tokens
    per second.
    """

    name: str
    rows: dict[int, dict[str, float]]
    base: int = 0
    size_bytes: int = 0
    tokens_per_second: float | None = None


@dataclass(frozen=True)
class PairResult:
    """The test of one metric between two versions."""

    first: Contender
    second: Contender
    metric: str
    rows: int
    means: tuple[float, float]
    p: float

    @property
    def is_different(self) -> bool:
        return self.means[0] != self.means[1]

    @property
    def ranked(self) -> tuple[Contender, Contender]:
        """Both versions, the better one first."""
        low, high = sorted(
            (self.first, self.second), key=lambda side: self.means[side is self.second]
        )
        return (high, low) if METRICS[self.metric].better == "high" else (low, high)

    @property
    def means_text(self) -> str:
        is_share = METRICS[self.metric].unit == "share"
        best, worst = (
            format_score(self.means[side is self.second], is_share=is_share) for side in self.ranked
        )
        return f"{best} vs. {worst}"

    @property
    def metric_label(self) -> str:
        title = METRICS[self.metric].title
        return (
            title
            if title.isupper() or "-" in title or title == "chrF"
            else title[0].lower() + title[1:]
        )


@dataclass(frozen=True)
class Verdict:
    """The result for a pair as a sentence for people."""

    message: str
    is_significant: bool
    winner: str = ""


def build_verdicts(contenders: Sequence[Contender]) -> list[Verdict]:
    """One verdict per pair, in order."""
    pairs = list(combinations(contenders, 2))
    results = [run_pair_tests(pair) for pair in pairs]
    p_values = {
        (index, one.metric): one.p for index, of_pair in enumerate(results) for one in of_pair
    }
    adjusted = dict(zip(p_values, adjust_holm(list(p_values.values())), strict=True))
    return [
        build_verdict(pair, [(one, adjusted[index, one.metric]) for one in of_pair])
        for index, (pair, of_pair) in enumerate(zip(pairs, results, strict=True))
    ]


def run_pair_tests(pair: tuple[Contender, Contender]) -> list[PairResult]:
    """One test per metric group; perplexity comes last."""
    groups = (*METRIC_GROUPS, (PERPLEXITY,)) if pair[0].base == pair[1].base else METRIC_GROUPS
    return [result for group in groups if (result := run_group_test(pair, group)) is not None]


def build_verdict(
    pair: tuple[Contender, Contender], tests: Sequence[tuple[PairResult, float]]
) -> Verdict:
    """The sentence starts with a significant difference between the replies. If the replies do not
    differ, perplexity may lead.
    """
    if not tests:
        return Verdict(
            f"{pair[0].name} and {pair[1].name}: too few rows with scores for both to run a test.",
            is_significant=False,
        )
    different = [(one, p) for one, p in tests if one.is_different]
    reply_tests = [(one, p) for one, p in different if one.metric != PERPLEXITY]
    significant = [(one, p) for one, p in reply_tests if p < ALPHA]
    main, p = (significant or reply_tests or different or list(tests))[0]
    headline = format_verdict(
        main, p, also_tested=[one.metric_label for one, _ in reply_tests if one is not main]
    )
    secondary = [format_secondary(one, p) for one, p in different if one is not main and p < ALPHA]
    return Verdict(
        " ".join([headline.message, *secondary]), headline.is_significant, headline.winner
    )


def run_group_test(pair: tuple[Contender, Contender], metrics: Sequence[str]) -> PairResult | None:
    """Test the first metric of the group whose means differ. None if fewer than MIN_ROWS rows are
    scored for both.
    """
    first, second = pair
    result = None
    for metric in metrics:
        rows = [
            row
            for row, scores in first.rows.items()
            if metric in scores and metric in second.rows.get(row, {})
        ]
        if len(rows) < MIN_ROWS:
            continue
        ours, theirs = ([side.rows[row][metric] for row in rows] for side in (first, second))
        means = (mean_or_none(ours) or 0.0, mean_or_none(theirs) or 0.0)
        result = PairResult(
            first,
            second,
            metric,
            len(rows),
            means,
            p_value(ours, theirs, is_binary=METRICS[metric].is_binary),
        )
        if result.is_different:
            return result
    return result


def p_value(ours: Sequence[float], theirs: Sequence[float], *, is_binary: bool) -> float:
    """Two-sided p-value. Rows with equal scores are ignored in both tests."""
    from scipy.stats import binomtest, wilcoxon

    differences = [a - b for a, b in zip(ours, theirs, strict=True) if a != b]
    if not differences:
        return 1.0
    if is_binary:
        return float(binomtest(sum(d > 0 for d in differences), len(differences)).pvalue)
    return float(wilcoxon(differences).pvalue)


def adjust_holm(ps: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment: each p-value times the number of hypotheses left, made
    monotonic.
    """
    order = sorted(range(len(ps)), key=lambda index: ps[index])
    adjusted, highest = [0.0] * len(ps), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, ps[index] * (len(ps) - rank)))
        adjusted[index] = highest
    return adjusted


def format_verdict(result: PairResult, p: float, also_tested: Sequence[str] = ()) -> Verdict:
    """The sentence for the main result. `also_tested` names the other metrics that show no
    difference.
    """
    better, worse = result.ranked
    figures = f"{result.means_text} on {result.rows:,} rows"
    costs = "; ".join(
        filter(None, (format_size_ratio(better, worse), format_speed_change(better, worse)))
    )
    tail = f"; {costs}" if costs else ""
    if p >= ALPHA:
        others = f"; none on {' or '.join(also_tested)} either" if also_tested else ""
        message = (
            f"No significant difference between {better.name} and {worse.name}: "
            f"{result.metric_label} {figures}, p {format_p_value(p)}{others}{tail}."
        )
        return Verdict(message, is_significant=False)
    message = (
        f"{better.name} beats {worse.name} on {result.metric_label}, {figures}, "
        f"p {format_p_value(p)}{tail}."
    )
    return Verdict(message, is_significant=True, winner=better.name)


def format_secondary(result: PairResult, p: float) -> str:
    """The sentence for another significant result."""
    better, worse = result.ranked
    if result.metric == PERPLEXITY:
        claim = f"{better.name} has lower perplexity on the expected answers than {worse.name}:"
    else:
        claim = f"{better.name} is better on {result.metric_label}:"
    return f"{claim} {result.means_text}, p {format_p_value(p)}."


def format_score(value: float, *, is_share: bool) -> str:
    return f"{value:.0%}" if is_share else f"{value:.3g}"


def format_p_value(p: float) -> str:
    return f"= {p:.2g}" if p >= 0.001 else "< 0.001"


def format_size_ratio(better: Contender, worse: Contender) -> str:
    if not better.size_bytes or not worse.size_bytes:
        return ""
    ratio = better.size_bytes / worse.size_bytes
    if abs(ratio - 1) < SAME_TOLERANCE:
        return "same size"
    return f"{ratio:.1f} times as large" if ratio > 1 else f"{1 / ratio:.1f} times smaller"


def format_speed_change(better: Contender, worse: Contender) -> str:
    if not better.tokens_per_second or not worse.tokens_per_second:
        return ""
    change = better.tokens_per_second / worse.tokens_per_second - 1
    if abs(change) < SAME_TOLERANCE:
        return "same speed"
    return f"{abs(change):.0%} {'faster' if change > 0 else 'slower'}"
