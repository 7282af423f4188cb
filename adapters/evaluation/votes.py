"""Blind votes on pairs of replies, and win rates computed from them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

from django.db.models import Q, QuerySet

from adapters.models import AdapterVersion, PromptSet, Reply, Vote
from training.errors import UserError
from training.people.models import User

# A choice from the second version's point of view
SWAPPED_CHOICES = {"first": "second", "second": "first", "tie": "tie"}


@dataclass(frozen=True)
class VotePair:
    """A row with two replies. `is_swapped` means that the left reply is the second version's."""

    row: int
    left: str
    right: str
    is_swapped: bool


@dataclass(frozen=True)
class WinRate:
    """How often the first version won. Ties count half for each; `low` and `high` are Wilson's 95%
    interval (1927).
    """

    votes: int
    voters: int
    wins: int
    losses: int
    ties: int
    rate: float | None
    low: float
    high: float


def order_pair(
    first: AdapterVersion, second: AdapterVersion
) -> tuple[AdapterVersion, AdapterVersion]:
    """The pair in the order in which votes are stored, so that (a, b) and (b, a) share
    their votes.
    """
    return (first, second) if first.pk < second.pk else (second, first)


def get_next_pair(
    user: User, prompts: PromptSet, first: AdapterVersion, second: AdapterVersion
) -> VotePair | None:
    """The next row that this person has not voted on and whose replies differ, in an order of the
    person's own.
    """
    voted_rows = set(get_own_votes(user, prompts, first, second).values_list("row", flat=True))
    texts = {version.pk: dict(get_reply_texts(prompts, version)) for version in (first, second)}
    rows = [row for row in texts[first.pk] if row in texts[second.pk] and row not in voted_rows]
    differing_rows = [row for row in rows if texts[first.pk][row] != texts[second.pk][row]]
    if not differing_rows:
        return None
    row = min(
        differing_rows, key=lambda row_index: stable_random(user, prompts, first, second, row_index)
    )
    is_swapped = stable_random(user, prompts, first, second, row) % 2 == 1
    replies = texts[first.pk][row], texts[second.pk][row]
    left, right = reversed(replies) if is_swapped else replies
    return VotePair(row, left, right, is_swapped)


def get_own_votes(
    user: User, prompts: PromptSet, first: AdapterVersion, second: AdapterVersion
) -> QuerySet[Vote]:
    return Vote.objects.filter(prompts=prompts, first=first, second=second, voter=user)


def count_own_votes(
    user: User, prompts: PromptSet, first: AdapterVersion, second: AdapterVersion
) -> int:
    """How many rows this person has voted on."""
    return get_own_votes(user, prompts, first, second).count()


def get_reply_texts(prompts: PromptSet, version: AdapterVersion) -> list[tuple[int, str]]:
    return list(Reply.objects.filter(prompts=prompts, version=version).values_list("row", "text"))


def stable_random(
    user: User, prompts: PromptSet, first: AdapterVersion, second: AdapterVersion, row: int
) -> int:
    """A random number per person and row that never changes, so that a reload does not reveal the
    order of the sides.
    """
    seed = f"{user.pk}:{prompts.pk}:{first.pk}:{second.pk}:{row}".encode()
    return int.from_bytes(hashlib.sha256(seed).digest()[:8])


def cast_vote(
    user: User,
    prompts: PromptSet,
    pair: tuple[AdapterVersion, AdapterVersion],
    row: int,
    side: str,
) -> Vote:
    """Store `left`, `right` or `tie` as a choice between the versions. Voting again on a row
    replaces the choice.

    Raises:
        UserError: another choice, or a row without two replies.
    """
    first, second = pair
    if side not in ("left", "right", "tie"):
        raise UserError("`choice` must be left, right or tie.", field="choice")
    reply_count = Reply.objects.filter(
        prompts=prompts, row=row, version__in=(first, second)
    ).count()
    if reply_count < 2:
        raise UserError("This row does not have both replies yet.", field="row")
    is_swapped = stable_random(user, prompts, first, second, row) % 2 == 1
    choice = "tie"
    if side != "tie":
        choice = "first" if (side == "left") is not is_swapped else "second"
    vote, _ = Vote.objects.update_or_create(
        prompts=prompts,
        row=row,
        first=first,
        second=second,
        voter=user,
        defaults={"choice": choice},
    )
    return vote


def get_win_rate(
    first: AdapterVersion, second: AdapterVersion, prompts: PromptSet | None = None
) -> WinRate:
    """The first version's wins over the second, in all votes or in those on one prompt set."""
    return get_win_rates([(first, second)], prompts)[0][2]


def get_win_rates(
    pairs: Sequence[tuple[AdapterVersion, AdapterVersion]], prompts: PromptSet | None = None
) -> list[tuple[AdapterVersion, AdapterVersion, WinRate]]:
    """The win rates of several pairs, in one query."""
    version_ids = {version.pk for pair in pairs for version in pair}
    rows = Vote.objects.filter(first__in=version_ids, second__in=version_ids)
    if prompts is not None:
        rows = rows.filter(prompts=prompts)
    votes_by_pair: dict[tuple[int, int], list[tuple[str, int]]] = {}
    for one, other, choice, voter in rows.values_list(
        "first_id", "second_id", "choice", "voter_id"
    ):
        votes_by_pair.setdefault((one, other), []).append((choice, voter))
    win_rates = []
    for first, second in pairs:
        ordered_pair = order_pair(first, second)
        first_choice, second_choice = (
            ("first", "second") if ordered_pair[0] == first else ("second", "first")
        )
        win_rates.append(
            (
                first,
                second,
                compute_win_rate(
                    votes_by_pair.get((ordered_pair[0].pk, ordered_pair[1].pk), []),
                    first_choice,
                    second_choice,
                ),
            )
        )
    return win_rates


def compute_win_rate(
    cast: Sequence[tuple[str, int]], first_choice: str, second_choice: str
) -> WinRate:
    choices = [choice for choice, _ in cast]
    wins, losses, ties = (choices.count(name) for name in (first_choice, second_choice, "tie"))
    points = wins + ties / 2
    low, high = win_interval(points, len(cast))
    voters = len({voter for _, voter in cast})
    return WinRate(
        len(cast), voters, wins, losses, ties, points / len(cast) if cast else None, low, high
    )


def win_interval(points: float, votes: int) -> tuple[float, float]:
    """Wilson's 95% interval of a share. It needs whole numbers, so a half point widens it: the
    lower end is computed with the half point dropped, the upper end with it rounded up.
    """
    from scipy.stats import binomtest

    if not votes:
        return 0.0, 1.0
    low, high = (
        binomtest(wins, votes).proportion_ci(method="wilson")
        for wins in (math.floor(points), math.ceil(points))
    )
    return float(low.low), float(high.high)


def get_overall_win_rate(version: AdapterVersion) -> WinRate | None:
    """A version's votes against all others; None without any."""
    rows = Vote.objects.filter(Q(first=version) | Q(second=version)).values_list(
        "first_id", "choice", "voter_id"
    )
    choices = [
        (choice if first == version.pk else SWAPPED_CHOICES[choice], voter)
        for first, choice, voter in rows
    ]
    return compute_win_rate(choices, "first", "second") if choices else None
