"""Look up users by name."""

from __future__ import annotations

from training.errors import NotFound, to_one_line
from training.people.models import User


def get_user_by_name(username: str, *, only_active: bool = False) -> User:
    """Raises NotFound: no user has that name, or they are inactive and `only_active` is set."""
    name = to_one_line(username)
    user = User.objects.filter(username=name).first()
    if user is None or (only_active and not user.is_active):
        raise NotFound(f"User {name[:80]!r} not found.", field="username")
    return user
