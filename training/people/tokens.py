"""Create, look up and revoke API tokens."""

from __future__ import annotations

import hashlib
import secrets
from datetime import datetime, timedelta

from django.db import transaction
from django.db.models import Case, Q, QuerySet, When
from django.utils import timezone

from training.errors import Conflict, NotFound, UserError, to_one_line
from training.people.models import ApiToken, Scope, User

MAX_TOKENS = 50  # of a user, that are valid
MAX_DAYS = 3650
TOKEN_PREFIX = "snapml_"  # noqa: S105  a prefix, not a secret


class PasswordNotChanged(UserError):
    """The token is valid, but its user has not changed the one-time password yet."""

    status = 401

    def __init__(self, user: User) -> None:
        super().__init__(
            f"This token works once {user.username} has signed in on the website and changed the "
            "one-time password.",
            code="password_not_changed",
        )


def create_token(
    user: User, name: str, scope: str = Scope.WRITE, *, days: int | None = None
) -> tuple[ApiToken, str]:
    """Create a token that expires after `days`, or never. Returns it with its secret, which is not
    stored.

    Raises:
        UserError: the scope or the number of days is not allowed.
        Conflict: the user has MAX_TOKENS tokens.
    """
    if scope not in Scope.values:
        raise UserError(f"scope must be one of {', '.join(Scope.values)}.", field="scope")
    if days is not None and not 1 <= days <= MAX_DAYS:
        raise UserError(f"days must be between 1 and {MAX_DAYS:,}.", field="days")
    now = timezone.now()
    secret = TOKEN_PREFIX + secrets.token_urlsafe(32)
    with transaction.atomic():
        User.objects.select_for_update().get(pk=user.pk)  # serializes the count of the tokens
        if user.tokens.filter(is_valid_at(now)).count() >= MAX_TOKENS:
            raise Conflict(
                f"You have {MAX_TOKENS} tokens. Revoke one that you no longer need.",
                code="too_many_tokens",
            )
        token = ApiToken.objects.create(
            user=user,
            name=to_one_line(name)[:80] or "token",
            scope=scope,
            digest=hash_secret(secret),
            hint=secret[-4:],
            expires_at=None if days is None else now + timedelta(days=days),
        )
    return token, secret


def is_valid_at(now: datetime) -> Q:
    """The condition that a token is neither revoked nor expired."""
    return Q(revoked_at=None) & (Q(expires_at=None) | Q(expires_at__gt=now))


def find_token(secret: str) -> ApiToken | None:
    """The valid token with this secret, or None. Its time of use is updated at most once a minute,
    to save writes.

    Raises:
        PasswordNotChanged: the user has to change the one-time password first.
    """
    now = timezone.now()
    token = (
        ApiToken.objects.select_related("user")
        .filter(is_valid_at(now), digest=hash_secret(secret))
        .first()
    )
    if token is None or not token.user.is_active:
        return None
    if token.user.must_change_password:
        raise PasswordNotChanged(token.user)
    is_stale = Q(last_used_at=None) | Q(last_used_at__lt=now - timedelta(minutes=1))
    ApiToken.objects.filter(is_stale, pk=token.pk).update(last_used_at=now)
    return token


def list_tokens(user: User) -> QuerySet[ApiToken]:
    """A user's tokens: those that are valid first, and the newest first."""
    is_valid = Case(When(is_valid_at(timezone.now()), then=1), default=0)
    return user.tokens.order_by(is_valid.desc(), "-created_at")


def revoke_token(user: User, token_id: int) -> None:
    if not ApiToken.objects.filter(pk=token_id, user=user, revoked_at=None).update(
        revoked_at=timezone.now()
    ):
        raise NotFound(f"Token {token_id} not found.")


def hash_secret(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
