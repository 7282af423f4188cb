"""People by their names."""

from __future__ import annotations

from training.errors import NotFound, to_one_line
from training.people.models import User


def get_user_by_name(username: str, *, only_active: bool = False) -> User:
    """Raises NotFound: there is nobody of that name, or they have left and `only_active` is set."""
    name = to_one_line(username)
    user = User.objects.filter(username=name).first()
    if user is None or (only_active and not user.is_active):
        raise NotFound(f"There is nobody called {name[:80]!r}.", field="username")
    return user
