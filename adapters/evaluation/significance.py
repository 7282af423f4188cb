"""One sentence for two versions that the figures support, or that no difference is shown. Pure.

Rows that count 0 or 1 are told apart by McNemar's exact test (the binomial test of the rows where
the two differ), others by Wilcoxon's signed-rank test; both pair the same prompts. Of each group of
metrics one is tested; with several groups and pairs on a page the p-values are Holm's (1979).
Perplexities are compared only where a token is the same piece of text: on one base.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from adapters.evaluation.scores import METRICS, mean

SURE = 0.05
FEWEST_ROWS = 10
SAME_SHARE = 0.02  # sizes and speeds closer than this are called the same
SURPRISE = "perplexity"
GROUPS = (("exact", "normalised"), ("fields", "json_valid", "rouge_l", "chrf"))


@dataclass(frozen=True, kw_only=True)
class Side:
    """A version in a comparison: its name, its base, its scores by row, and what it costs. Units:
    bytes, tokens a second.
    """

    name: str
    rows: dict[int, dict[str, float]]
    base: int = 0
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

    @property
    def apart(self) -> bool:
        return self.means[0] != self.means[1]

    @property
    def sides(self) -> tuple[Side, Side]:
        """The better one first."""
        low, high = sorted(
            (self.first, self.second), key=lambda side: self.means[side is self.second]
        )
        return (high, low) if METRICS[self.metric].better == "high" else (low, high)

    @property
    def figures(self) -> str:
        share = METRICS[self.metric].unit == "share"
        best, worst = (shown(self.means[side is self.second], share=share) for side in self.sides)
        return f"{best} against {worst}"

    @property
    def named(self) -> str:
        title = METRICS[self.metric].title
        return (
            title
            if title.isupper() or "-" in title or title == "chrF"
            else title[0].lower() + title[1:]
        )


@dataclass(frozen=True)
class Verdict:
    words: str
    sure: bool
    winner: str = ""


def verdicts(sides: Sequence[Side]) -> list[Verdict]:
    """One for each pair, in order: what tells them apart, and how the expected answers surprise
    them.
    """
    pairs = list(combinations(sides, 2))
    found = [findings(pair) for pair in pairs]
    tests = {(place, one.metric): one.p for place, of_pair in enumerate(found) for one in of_pair}
    sure_of = dict(zip(tests, holm(list(tests.values())), strict=True))
    return [
        verdict(pair, [(one, sure_of[place, one.metric]) for one in of_pair])
        for place, (pair, of_pair) in enumerate(zip(pairs, found, strict=True))
    ]


def findings(pair: tuple[Side, Side]) -> list[Finding]:
    """One of each group, those that compare replies first."""
    groups = (*GROUPS, (SURPRISE,)) if pair[0].base == pair[1].base else GROUPS
    return [found for group in groups if (found := finding(pair, group)) is not None]


def verdict(pair: tuple[Side, Side], tested: Sequence[tuple[Finding, float]]) -> Verdict:
    """What is sure of the replies leads; where replies are the same, the surprise may."""
    if not tested:
        return Verdict(
            f"{pair[0].name} and {pair[1].name}: too few scored rows in common for a test.",
            sure=False,
        )
    apart = [(one, p) for one, p in tested if one.apart]
    replies = [(one, p) for one, p in apart if one.metric != SURPRISE]
    sure = [(one, p) for one, p in replies if p < SURE]
    main, p = (sure or replies or apart or list(tested))[0]
    told = sentence(main, p, beside=[one.named for one, _ in replies if one is not main])
    more = [also_words(one, p) for one, p in apart if one is not main and p < SURE]
    return Verdict(" ".join([told.words, *more]), told.sure, told.winner)


def finding(pair: tuple[Side, Side], metrics: Sequence[str]) -> Finding | None:
    """The test of the first of the metrics that tells the two apart; None with fewer than
    FEWEST_ROWS rows in common.
    """
    first, second = pair
    last = None
    for metric in metrics:
        rows = [
            row
            for row, scores in first.rows.items()
            if metric in scores and metric in second.rows.get(row, {})
        ]
        if len(rows) < FEWEST_ROWS:
            continue
        ours, theirs = ([side.rows[row][metric] for row in rows] for side in (first, second))
        means = (mean(ours) or 0.0, mean(theirs) or 0.0)
        last = Finding(
            first,
            second,
            metric,
            len(rows),
            means,
            p_value(ours, theirs, counts=METRICS[metric].counts),
        )
        if last.apart:
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


def sentence(found: Finding, p: float, beside: Sequence[str] = ()) -> Verdict:
    """`beside`: other metrics that were tested and show nothing either, if this one does not."""
    better, worse = found.sides
    figures = f"{found.figures} on {found.rows:,} rows"
    costs = "; ".join(filter(None, (size_words(better, worse), speed_words(better, worse))))
    tail = f"; {costs}" if costs else ""
    if p >= SURE:
        nor = f", nor on {', '.join(beside)}" if beside else ""
        words = (
            f"No difference shown between {better.name} and {worse.name}: {found.named} "
            f"{figures}, p {p_words(p)}{nor}{tail}."
        )
        return Verdict(words, sure=False)
    words = f"{better.name} beats {worse.name} on {found.named}, {figures}, p {p_words(p)}{tail}."
    return Verdict(words, sure=True, winner=better.name)


def also_words(found: Finding, p: float) -> str:
    """Of what is sure beside the main finding."""
    better, worse = found.sides
    if found.metric == SURPRISE:
        told = (
            f"{better.name} is less surprised by the expected answers than {worse.name}: perplexity"
        )
    else:
        told = f"{better.name} is better on {found.named}:"
    return f"{told} {found.figures}, p {p_words(p)}."


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
