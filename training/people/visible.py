"""One way to get a thing that somebody may see, and one to get a thing that they may change."""

from __future__ import annotations

from typing import Any, TypeVar

from training.errors import NotAllowed, NotFound
from training.people.models import Owned, User

Thing = TypeVar("Thing", bound=Owned)


def get_visible(kind: type[Thing], user: User, pk: int, *related: str) -> Thing:
    """The thing, if it is the person's own, their team's, or they are an admin.

    Raises:
        NotFound: it is not there, or not for their eyes; the two read the same.
    """
    rows: Any = kind.objects.visible_to(user)
    found = (
        rows.select_related(*related).filter(pk=pk).first()
        if related
        else rows.filter(pk=pk).first()
    )
    if found is None:
        raise NotFound(f"There is no {kind._meta.verbose_name} {pk} that you may see.")
    return found  # type: ignore[no-any-return]


def get_changeable(kind: type[Thing], user: User, pk: int, *related: str) -> Thing:
    """The thing, if the person may change it.

    Raises:
        NotFound: it is not there, or not for their eyes.
        NotAllowed: they may only look at it.
    """
    found = get_visible(kind, user, pk, *related)
    may_change(user, found)
    return found


def may_change(user: User, thing: Owned) -> None:
    """Raises NotAllowed: the thing is neither theirs nor of a team that they lead."""
    kind: Any = type(thing)
    if not kind.objects.changeable_by(user).filter(pk=thing.pk).exists():
        name = thing._meta.verbose_name
        raise NotAllowed(
            f"Only its owner, {thing.owner.username}, a lead of its team or an admin may change "
            f"this {name}."
        )
