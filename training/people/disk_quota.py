"""Disk quotas of users and teams: what their items take, and the check before something is stored.

Each model with files is registered by its app. Its rows know their bytes (`Stored.disk_bytes`), so
a check is one sum for each model and reads no folder.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from django.conf import settings
from django.db import transaction
from django.db.models import Exists, F, JSONField, OuterRef, Q, QuerySet, Sum, Value
from django.urls import reverse

from training.errors import Conflict
from training.formatting import format_bytes
from training.people.models import Stored, Team, User

WARNING_FRACTION = 0.9
NO_ROWS = Q(pk__in=())
MAX_ITEMS = 100  # on the page


@dataclass(frozen=True, kw_only=True)
class StoredKind:
    """A model whose rows have files. The names are those of its fields, or paths to them."""

    title: str  # "Runs with checkpoints"
    item_title: str  # "Run"
    model: type[Stored]
    url_name: str  # of the page on which an item is deleted
    url_argument: str = "pk"  # the field with its argument
    name: str = "name"
    owner: str = "owner"
    team: str | None = "team"
    is_in_use: Q  # rows that cannot be deleted now
    in_use_reason: str
    has_reservation: Q = NO_ROWS  # rows whose `disk_bytes` is what their files may take

    def filter_visible(self, user: User) -> QuerySet[Any]:
        rows: QuerySet[Any] = self.model._base_manager.all()
        if user.is_superuser:
            return rows
        is_visible = Q(**{self.owner: user})
        if self.team:
            is_visible |= Q(**{f"{self.team}__in": user.teams.values("pk")})
        return rows.filter(is_visible)


STORED_KINDS: list[StoredKind] = []


def register_stored_kind(kind: StoredKind) -> None:
    STORED_KINDS.append(kind)


@dataclass(frozen=True)
class DiskUsage:
    """What the items of a user or team take, by kind, and their quota in bytes."""

    holder: User | Team
    by_kind: dict[str, int]
    quota: int | None

    @property
    def is_team(self) -> bool:
        return isinstance(self.holder, Team)

    @property
    def used(self) -> int:
        return sum(self.by_kind.values())

    @property
    def fraction(self) -> float | None:
        """Of the quota, at most 1."""
        return None if self.quota is None else min(1.0, self.used / max(1, self.quota))

    @property
    def is_over_quota(self) -> bool:
        return self.quota is not None and self.used > self.quota

    @property
    def is_near_quota(self) -> bool:
        return self.fraction is not None and self.fraction >= WARNING_FRACTION


@dataclass(frozen=True)
class StoredItem:
    kind: StoredKind
    url: str  # of the page on which it is deleted
    name: str
    owner: str
    team: str
    bytes: int
    in_use_reason: str  # empty: it can be deleted


def get_quota(holder: User | Team) -> int | None:
    """Bytes that the items of a user or team may take; None without a limit. By default half of the
    disk for a user, so that none fills it alone, and no limit for admins and teams.
    """
    if holder.max_disk_bytes is not None:
        return holder.max_disk_bytes
    if isinstance(holder, Team) or holder.is_superuser:
        return None
    return settings.DISK_QUOTA_BYTES or shutil.disk_usage(settings.HOME).total // 2


def get_disk_usage(holder: User | Team) -> DiskUsage:
    return list_disk_usages([holder])[0]


def list_disk_usages(holders: Sequence[User | Team]) -> list[DiskUsage]:
    """What each of them uses, with two queries for each kind."""
    totals = {
        model: sum_by_holder(model, [one.pk for one in holders if isinstance(one, model)])
        for model in (User, Team)
    }
    usages = []
    for holder in holders:
        model = Team if isinstance(holder, Team) else User
        used = totals[model].get(holder.pk, Counter())
        by_kind = {kind.title: used[kind.title] for kind in STORED_KINDS}
        usages.append(DiskUsage(holder, by_kind, get_quota(holder)))
    return usages


def sum_by_holder(
    model: type[User] | type[Team], holder_ids: Sequence[int] | None = None
) -> dict[int, Counter[str]]:
    """The bytes of each kind that count towards the quota of each user or team, by its id. None
    stands for all of them.
    """
    totals: dict[int, Counter[str]] = {}
    if holder_ids is not None and not holder_ids:
        return totals
    for kind in STORED_KINDS:
        path = kind.owner if model is User else kind.team
        if path is None:
            continue
        rows = kind.model._base_manager.order_by()
        if holder_ids is not None:
            rows = rows.filter(**{f"{path}__in": holder_ids})
        for row in rows.values(holder=F(path)).annotate(total=Sum("disk_bytes")):
            if row["holder"] is not None and row["total"]:
                totals.setdefault(row["holder"], Counter())[kind.title] += row["total"]
    return totals


def get_free_bytes(owner: User, team: Team | None) -> int | None:
    """What the quotas of an owner and a team leave; None without a limit."""
    usages = [get_disk_usage(holder) for holder in (owner, team) if holder is not None]
    free = [usage.quota - usage.used for usage in usages if usage.quota is not None]
    return max(0, min(free)) if free else None


def lock_quotas(owner: User, team: Team | None) -> list[User | Team]:
    """Lock the rows of an owner and a team until the transaction ends."""
    assert transaction.get_connection().in_atomic_block
    holders: list[User | Team] = [User.objects.select_for_update().get(pk=owner.pk)]
    if team is not None:
        holders.append(Team.objects.select_for_update().get(pk=team.pk))
    return holders


def check_disk_quota(owner: User, team: Team | None, new_bytes: int) -> None:
    """Check that an item of this size may be stored. Call it in the transaction that stores
    `disk_bytes` of the item: it locks the quotas until the end.

    Raises:
        Conflict: a quota would be exceeded.
    """
    for usage in map(get_disk_usage, lock_quotas(owner, team)):
        if usage.quota is None or usage.used + new_bytes <= usage.quota:
            continue
        name = f"Team {usage.holder}" if usage.is_team else str(usage.holder)
        raise Conflict(
            f"{name} uses {format_bytes(usage.used)} of a disk quota of "
            f"{format_bytes(usage.quota)}, and this may take {format_bytes(new_bytes)} more. "
            "Delete something (see Disk usage), or ask an admin for a larger quota.",
            code="disk_quota",
        )


def list_items(user: User) -> list[StoredItem]:
    """The largest items that the user may see, largest first."""
    items = sorted(
        (item for kind in STORED_KINDS for item in list_items_of_kind(kind, user)),
        key=lambda item: -item.bytes,
    )
    return items[:MAX_ITEMS]


def list_items_of_kind(kind: StoredKind, user: User) -> Iterator[StoredItem]:
    largest = kind.filter_visible(user).filter(disk_bytes__gt=0).order_by("-disk_bytes")
    columns = (
        kind.url_argument,
        kind.name,
        f"{kind.owner}__username",
        f"{kind.team}__name" if kind.team else Value(""),
        "disk_bytes",
    )
    in_use = kind.model._base_manager.filter(kind.is_in_use, pk=OuterRef("pk"))
    for argument, name, owner, team, size, is_in_use in largest.values_list(
        *columns, Exists(in_use)
    )[:MAX_ITEMS]:
        reason = kind.in_use_reason if is_in_use else ""
        url = reverse(kind.url_name, args=[argument])
        yield StoredItem(kind, url, str(name), owner or "", team or "", size, reason)


def list_largest_holders(model: type[User] | type[Team]) -> list[DiskUsage]:
    """The users or teams whose items take most, largest first, and those with a quota of their own,
    for admins.
    """
    totals = sum_by_holder(model)
    limited = model._base_manager.exclude(max_disk_bytes=None).order_by("pk")[:MAX_ITEMS]
    for pk in limited.values_list("pk", flat=True):
        totals.setdefault(pk, Counter())
    largest = sorted(totals, key=lambda pk: -totals[pk].total())[:MAX_ITEMS]
    holders: dict[int, Any] = model._base_manager.in_bulk(largest)
    return [DiskUsage(holders[pk], dict(totals[pk]), get_quota(holders[pk])) for pk in largest]


def update_all_disk_bytes() -> None:
    """Measure all items without a reservation: a process may have ended without doing so."""
    for kind in STORED_KINDS:
        rows: QuerySet[Any] = kind.model._base_manager.exclude(kind.has_reservation)
        large = [field.name for field in kind.model._meta.fields if isinstance(field, JSONField)]
        for row in rows.defer(*large).iterator():
            size = row.measure_disk_bytes()
            # The item may have got a reservation meanwhile
            rows.filter(pk=row.pk).exclude(disk_bytes=size).update(disk_bytes=size)
