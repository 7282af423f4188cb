"""API tokens expire, and a user has a limited number of them."""

from datetime import timedelta

import pytest
from django.core.management import CommandError, call_command
from django.utils import timezone

from tests.user_errors import raises_user_error
from training.errors import Conflict
from training.people import tokens
from training.people.models import ApiToken

pytestmark = pytest.mark.django_db


def get_me(client, secret):
    return client.get("/api/v1/people/me", HTTP_AUTHORIZATION=f"Bearer {secret}").status_code


def test_a_token_works_until_it_expires(client, alice):
    token, secret = tokens.create_token(alice, "notebook", days=30)
    assert token.expires_at - timezone.now() > timedelta(days=29)
    assert get_me(client, secret) == 200
    ApiToken.objects.update(expires_at=timezone.now())
    assert get_me(client, secret) == 401


def test_only_valid_tokens_count_against_the_limit(alice, monkeypatch):
    monkeypatch.setattr(tokens, "MAX_TOKENS", 2)
    first, _ = tokens.create_token(alice, "a", days=1)
    second, _ = tokens.create_token(alice, "b")
    with raises_user_error(Conflict, code="too_many_tokens"):
        tokens.create_token(alice, "c")
    ApiToken.objects.filter(pk=first.pk).update(expires_at=timezone.now())
    tokens.create_token(alice, "c")
    tokens.revoke_token(alice, second.pk)
    tokens.create_token(alice, "d")


@pytest.mark.parametrize("days", [0, -1, tokens.MAX_DAYS + 1])
def test_an_impossible_number_of_days_is_refused(alice, days):
    with raises_user_error(field="days"):
        tokens.create_token(alice, "a", days=days)
    with pytest.raises(CommandError, match="days"):
        call_command("token", "alice", "--days", str(days))


def test_the_page_creates_a_token_that_expires_and_says_when(as_alice, alice):
    response = as_alice.post("/account/tokens", {"name": "a", "scope": "read", "days": "90"})
    assert response.status_code == 200
    token = ApiToken.objects.get()
    assert token.expires_at.strftime("%Y-%m-%d") in response.content.decode()
    ApiToken.objects.update(expires_at=timezone.now())
    assert "expired" in as_alice.get("/account").content.decode()


def test_the_api_says_when_a_token_was_used_and_expires(as_alice, alice):
    body = {"name": "a", "scope": "read", "days": 7}
    answer = as_alice.post("/api/v1/people/me/tokens", body, content_type="application/json")
    assert answer.status_code == 201
    (token,) = as_alice.get("/api/v1/people/me/tokens").json()["items"]
    assert token["expires_at"] and token["last_used_at"] is None


def test_the_account_page_stays_small_with_many_tokens(as_alice, alice):
    ApiToken.objects.bulk_create(
        ApiToken(user=alice, name=f"token {n}", digest=str(n), hint="abcd") for n in range(1_000)
    )
    assert len(as_alice.get("/account").content) < 150_000


@pytest.mark.parametrize("days", ["0", "-5", "soon"])
def test_the_page_refuses_an_impossible_number_of_days(as_alice, alice, days):
    as_alice.post("/account/tokens", {"name": "a", "scope": "read", "days": days})
    assert not ApiToken.objects.exists()


def test_the_page_lists_valid_tokens_before_all_others(as_alice, alice):
    tokens.create_token(alice, "still valid")
    ApiToken.objects.bulk_create(
        ApiToken(user=alice, name="old", digest=str(n), hint="abcd", revoked_at=timezone.now())
        for n in range(200)
    )
    assert "still valid" in as_alice.get("/account").content.decode()
