"""A user has no more tokens and webhooks than allowed, however many requests come at a time."""

import threading

import pytest
from django.db import connections

from training.errors import Conflict, TooLarge
from training.people import tokens
from training.people.models import User
from training.webhooks import services as webhooks

THREADS, LIMIT = 12, 3


def add_concurrently(user, add):
    """Call `add` in many threads at once. Returns the classes of the errors."""
    start_barrier, errors = threading.Barrier(THREADS), []

    def run():
        try:
            own_user = User.objects.get(pk=user.pk)
            start_barrier.wait()
            add(own_user)
        except Exception as error:  # noqa: BLE001 asserted by the test in the main thread
            errors.append(type(error))
        finally:
            connections.close_all()

    threads = [threading.Thread(target=run) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


@pytest.mark.django_db(transaction=True)
def test_concurrent_requests_create_only_as_many_tokens_as_allowed(alice, monkeypatch):
    monkeypatch.setattr(tokens, "MAX_TOKENS", LIMIT)
    errors = add_concurrently(alice, lambda user: tokens.create_token(user, "a"))
    assert errors == [Conflict] * (THREADS - LIMIT)
    assert alice.tokens.count() == LIMIT


@pytest.mark.django_db(transaction=True)
def test_concurrent_requests_add_only_as_many_webhooks_as_allowed(alice, monkeypatch):
    monkeypatch.setattr(webhooks, "MAX_WEBHOOKS", LIMIT)
    monkeypatch.setattr(webhooks, "resolve_host", lambda _url: "192.0.2.1")
    errors = add_concurrently(
        alice, lambda user: webhooks.add_webhook(user, "https://example.com/x")
    )
    assert errors == [TooLarge] * (THREADS - LIMIT)
    assert alice.webhooks.count() == LIMIT
