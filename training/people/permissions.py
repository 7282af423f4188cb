"""Get a row that a user may see or change, or raise."""

from __future__ import annotations

from typing import Any, TypeVar

from django.utils.text import capfirst

from training.errors import NotAllowed, NotFound
from training.people.models import Owned, User

OwnedModel = TypeVar("OwnedModel", bound=Owned)


def get_visible(model: type[OwnedModel], user: User, pk: int, *related: str) -> OwnedModel:
    """The row, if the user or one of their teams owns it, or they are an admin.

    Raises:
        NotFound: it does not exist, or the user may not see it. The message is the same for both.
    """
    rows: Any = model.objects.visible_to(user)
    row = (
        rows.select_related(*related).filter(pk=pk).first()
        if related
        else rows.filter(pk=pk).first()
    )
    if row is None:
        raise NotFound(f"{capfirst(model._meta.verbose_name)} {pk} not found.")
    return row  # type: ignore[no-any-return]


def check_admin(user: User, action: str) -> None:
    """Raises NotAllowed: "Only admins can {action}."."""
    if not user.is_superuser:
        raise NotAllowed(f"Only admins can {action}.", code="admin_only")


def get_changeable(model: type[OwnedModel], user: User, pk: int, *related: str) -> OwnedModel:
    """The row, if the user may change it.

    Raises:
        NotFound: it does not exist, or the user may not see it.
        NotAllowed: they may see it, but not change it.
    """
    row = get_visible(model, user, pk, *related)
    check_changeable(user, row)
    return row


def check_changeable(user: User, owned: Owned) -> None:
    """Raises NotAllowed: the user neither owns the row nor leads its team."""
    model: Any = type(owned)
    if not model.objects.changeable_by(user).filter(pk=owned.pk).exists():
        name = owned._meta.verbose_name
        raise NotAllowed(
            f"Only the owner ({owned.owner.username}), a lead of the team or an admin may change "
            f"this {name}."
        )
