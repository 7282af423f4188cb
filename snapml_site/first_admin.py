"""Creates the first admin, with a one-time password."""

from __future__ import annotations

import secrets

from training.people.models import User

ADMIN_NAME = "admin"


def prepare_first_admin() -> str:
    """Create the first admin, or replace a one-time password that was never used. Returns what
    `manage.py up` prints after the URL.
    """
    admin = User.objects.filter(username=ADMIN_NAME).first()
    if admin is None and User.objects.filter(is_superuser=True).exists():
        return "(sign in with your password)"
    if admin is not None and not admin.must_change_password:
        return "(sign in with your password)"
    password = secrets.token_urlsafe(9)
    if admin is None:
        admin = User(
            username=ADMIN_NAME, is_superuser=True, is_staff=True, must_change_password=True
        )
    admin.set_password(password)
    admin.save()
    return f"(sign in as {ADMIN_NAME}, one-time password {password})"
