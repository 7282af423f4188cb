"""One way to get a thing that somebody may see, and one to get a thing that they may change."""

from __future__ import annotations

from typing import Any, TypeVar

from training.errors import NotAllowed, NotFound
from training.people.models import Owned, User

OwnedModel = TypeVar("OwnedModel", bound=Owned)


def get_visible(model: type[OwnedModel], user: User, pk: int, *related: str) -> OwnedModel:
    """The thing, if it is the person's own, their team's, or they are an admin.

    Raises:
        NotFound: it is not there, or not for their eyes; the two read the same.
    """
    rows: Any = model.objects.visible_to(user)
    row = (
        rows.select_related(*related).filter(pk=pk).first()
        if related
        else rows.filter(pk=pk).first()
    )
    if row is None:
        raise NotFound(f"There is no {model._meta.verbose_name} {pk} that you may see.")
    return row  # type: ignore[no-any-return]


def get_changeable(model: type[OwnedModel], user: User, pk: int, *related: str) -> OwnedModel:
    """The thing, if the person may change it.

    Raises:
        NotFound: it is not there, or not for their eyes.
        NotAllowed: they may only look at it.
    """
    row = get_visible(model, user, pk, *related)
    check_changeable(user, row)
    return row


def check_changeable(user: User, owned: Owned) -> None:
    """Raises NotAllowed: the thing is neither theirs nor of a team that they lead."""
    model: Any = type(owned)
    if not model.objects.changeable_by(user).filter(pk=owned.pk).exists():
        name = owned._meta.verbose_name
        raise NotAllowed(
            f"Only its owner, {owned.owner.username}, a lead of its team or an admin may change "
            f"this {name}."
        )
