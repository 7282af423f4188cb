"""API tokens: made, found by their secret, revoked."""

from __future__ import annotations

import hashlib
import secrets
from datetime import timedelta

from django.db.models import Q
from django.utils import timezone

from training.errors import NotFound
from training.people.models import ApiToken, User

PREFIX = "snapml_"


def create_token(user: User, name: str) -> tuple[ApiToken, str]:
    """A new token and its secret, which is shown this once and never again."""
    secret = PREFIX + secrets.token_urlsafe(32)
    token = ApiToken.objects.create(user=user, name=name[:80] or "token", digest=digest_of(secret), hint=secret[-4:])
    return token, secret


def user_of_token(secret: str) -> User | None:
    """The active person behind a token; notes its use, at most once a minute to spare writes."""
    token = ApiToken.objects.select_related("user").filter(digest=digest_of(secret), revoked_at=None).first()
    if token is None or not token.user.is_active or token.user.must_change_password:
        return None
    now = timezone.now()
    stale = Q(last_used_at=None) | Q(last_used_at__lt=now - timedelta(minutes=1))
    ApiToken.objects.filter(stale, pk=token.pk).update(last_used_at=now)
    return token.user


def revoke_token(user: User, token_id: int) -> None:
    if not ApiToken.objects.filter(pk=token_id, user=user, revoked_at=None).update(revoked_at=timezone.now()):
        raise NotFound("There is no such token of yours.")


def digest_of(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
