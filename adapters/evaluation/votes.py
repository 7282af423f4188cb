"""Blind votes: two replies without names, in an order of chance, and a choice. What is told of them
knows no request.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

from django.db.models import Q, QuerySet

from adapters.models import AdapterVersion, PromptSet, Reply, Vote
from training.errors import UserError
from training.people.models import User

# A choice as the second version sees it
TURNED = {
    "first": "second",
    "second": "first",
    "tie": "tie",
}


@dataclass(frozen=True)
class Ballot:
    """A row with two replies. `swapped`: what is shown on the left is the second version's."""

    row: int
    left: str
    right: str
    swapped: bool


@dataclass(frozen=True)
class Rate:
    """How often the first version won. Ties count half for each; the interval is Wilson's (1927),
    95 %.
    """

    votes: int
    voters: int
    wins: int
    losses: int
    ties: int
    rate: float | None
    low: float
    high: float


def ordered(first: AdapterVersion, second: AdapterVersion) -> tuple[AdapterVersion, AdapterVersion]:
    """A pair is stored one way round, so that both ways are the same vote."""
    return (first, second) if first.pk < second.pk else (second, first)


def next_ballot(
    user: User, prompts: PromptSet, first: AdapterVersion, second: AdapterVersion
) -> Ballot | None:
    """The next row that this person has not voted on and that both have answered differently, in an
    order of the person's own.
    """
    done = set(mine(user, prompts, first, second).values_list("row", flat=True))
    found = {version.pk: dict(replies_of(prompts, version)) for version in (first, second)}
    rows = [row for row in found[first.pk] if row in found[second.pk] and row not in done]
    told_apart = [row for row in rows if found[first.pk][row] != found[second.pk][row]]
    if not told_apart:
        return None
    row = min(told_apart, key=lambda place: chance(user, prompts, first, second, place))
    swapped = chance(user, prompts, first, second, row) % 2 == 1
    replies = found[first.pk][row], found[second.pk][row]
    left, right = reversed(replies) if swapped else replies
    return Ballot(row, left, right, swapped)


def mine(
    user: User, prompts: PromptSet, first: AdapterVersion, second: AdapterVersion
) -> QuerySet[Vote]:
    return Vote.objects.filter(prompts=prompts, first=first, second=second, voter=user)


def voted(user: User, prompts: PromptSet, first: AdapterVersion, second: AdapterVersion) -> int:
    """How many rows this person has voted on."""
    return mine(user, prompts, first, second).count()


def replies_of(prompts: PromptSet, version: AdapterVersion) -> list[tuple[int, str]]:
    return list(Reply.objects.filter(prompts=prompts, version=version).values_list("row", "text"))


def chance(
    user: User, prompts: PromptSet, first: AdapterVersion, second: AdapterVersion, row: int
) -> int:
    """A number that is a person's own for each row, and the same each time: a reload must not show
    the other order.
    """
    told = f"{user.pk}:{prompts.pk}:{first.pk}:{second.pk}:{row}".encode()
    return int.from_bytes(hashlib.sha256(told).digest()[:8])


def vote(
    user: User,
    prompts: PromptSet,
    pair: tuple[AdapterVersion, AdapterVersion],
    row: int,
    shown: str,
) -> Vote:
    """Store a choice of `left`, `right` or `tie` as what it means. Voting again on a row replaces
    the choice.

    Raises:
        UserError: another word, or a row without two replies.
    """
    first, second = pair
    if shown not in ("left", "right", "tie"):
        raise UserError("Choose left, right or tie.", field="choice")
    answered = Reply.objects.filter(prompts=prompts, row=row, version__in=(first, second)).count()
    if answered < 2:
        raise UserError("This row does not have two replies yet.", field="row")
    swapped = chance(user, prompts, first, second, row) % 2 == 1
    choice = "tie"
    if shown != "tie":
        choice = "first" if (shown == "left") is not swapped else "second"
    made, _ = Vote.objects.update_or_create(
        prompts=prompts,
        row=row,
        first=first,
        second=second,
        voter=user,
        defaults={"choice": choice},
    )
    return made


def rate(first: AdapterVersion, second: AdapterVersion, prompts: PromptSet | None = None) -> Rate:
    """The first version's wins over the second in all votes, or in those on one set of prompts."""
    return rates([(first, second)], prompts)[0][2]


def rates(
    pairs: Sequence[tuple[AdapterVersion, AdapterVersion]], prompts: PromptSet | None = None
) -> list[tuple[AdapterVersion, AdapterVersion, Rate]]:
    """The same for several pairs, in one query."""
    some = {version.pk for pair in pairs for version in pair}
    rows = Vote.objects.filter(first__in=some, second__in=some)
    if prompts is not None:
        rows = rows.filter(prompts=prompts)
    cast: dict[tuple[int, int], list[tuple[str, int]]] = {}
    for one, other, choice, voter in rows.values_list(
        "first_id", "second_id", "choice", "voter_id"
    ):
        cast.setdefault((one, other), []).append((choice, voter))
    found = []
    for first, second in pairs:
        stored = ordered(first, second)
        mine, theirs = ("first", "second") if stored[0] == first else ("second", "first")
        found.append(
            (first, second, counted(cast.get((stored[0].pk, stored[1].pk), []), mine, theirs))
        )
    return found


def counted(cast: Sequence[tuple[str, int]], mine: str, theirs: str) -> Rate:
    choices = [choice for choice, _ in cast]
    wins, losses, ties = (choices.count(name) for name in (mine, theirs, "tie"))
    points = wins + ties / 2
    low, high = win_interval(points, len(cast))
    voters = len({voter for _, voter in cast})
    return Rate(
        len(cast), voters, wins, losses, ties, points / len(cast) if cast else None, low, high
    )


def win_interval(points: float, votes: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share. It is for whole numbers, so a half point widens it: from
    the low end without it to the high end with a whole one.
    """
    from scipy.stats import binomtest

    if not votes:
        return 0.0, 1.0
    low, high = (
        binomtest(whole, votes).proportion_ci(method="wilson")
        for whole in (math.floor(points), math.ceil(points))
    )
    return float(low.low), float(high.high)


def total(version: AdapterVersion) -> Rate | None:
    """Its votes against all others, for the version's own page; None without any."""
    rows = Vote.objects.filter(Q(first=version) | Q(second=version)).values_list(
        "first_id", "choice", "voter_id"
    )
    seen = [
        (choice if first == version.pk else TURNED[choice], voter) for first, choice, voter in rows
    ]
    return counted(seen, "first", "second") if seen else None
