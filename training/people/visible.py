"""One way to get a thing that somebody may see."""

from __future__ import annotations

from typing import Any, TypeVar

from training.errors import NotFound
from training.people.models import Owned, User

Thing = TypeVar("Thing", bound=Owned)


def get_visible(kind: type[Thing], user: User, pk: int, *related: str) -> Thing:
    """The thing, if it is the person's own, their team's, or they are an admin.

    Raises:
        NotFound: it is not there, or not for their eyes; the two read the same.
    """
    rows: Any = kind.objects.visible_to(user)
    found = rows.select_related(*related).filter(pk=pk).first() if related else rows.filter(pk=pk).first()
    if found is None:
        raise NotFound(f"There is no {kind._meta.verbose_name} {pk} that you may see.")
    return found  # type: ignore[no-any-return]
