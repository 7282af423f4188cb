"""Rules for every URL of pages, API and admin site, also for those that are added later."""

import pytest
from django.contrib.auth.hashers import MD5PasswordHasher
from django.test import Client

from tests.pages import fill_route, list_routes
from training.people.views import MAX_TRIES

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("no_program")]
PASSWORD_FORM = {
    "username": "root",
    "password": "guess",
    "old_password": "guess",
    "new_password1": "tulip-river-42",
    "new_password2": "tulip-river-42",
    "password1": "tulip-river-42",
    "password2": "tulip-river-42",
}


@pytest.fixture
def checked_passwords(monkeypatch):
    """The passwords that were compared with the stored one."""
    checked = []

    def verify(_self, password, _encoded):
        checked.append(password)
        return False

    monkeypatch.setattr(MD5PasswordHasher, "verify", verify)
    return checked


def test_every_url_that_checks_a_password_counts_the_attempts(
    client, people, things, checked_passwords
):
    admin = people["admin"]
    values = {**things, "id": people["bob"].pk, "object_id": people["bob"].pk}
    checking = set()
    for route in list_routes():
        url = fill_route(route, values)
        for is_signed_in in (False, True):
            client.logout()
            if is_signed_in:
                client.force_login(admin)
            client.post(url, PASSWORD_FORM)
            if checked_passwords:
                checking.add((url, is_signed_in))
            checked_passwords.clear()
    assert checking == {("/sign-in", False), ("/account/password", True)}
    for url, is_signed_in in checking:
        client.logout()
        if is_signed_in:
            client.force_login(admin)
        codes = [client.post(url, PASSWORD_FORM).status_code for _ in range(MAX_TRIES)]
        assert codes[-1] == 429, url


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "TRACE", "FOO"])
def test_no_page_takes_another_method(client, people, things, method):
    client.force_login(people["admin"])
    for route in list_routes():
        if not route.startswith(("/api/", "/admin/")):
            assert client.generic(method, fill_route(route, things)).status_code == 405, route


def test_no_operation_takes_an_unknown_method(client, people, things):
    client.force_login(people["admin"])
    for route in list_routes():
        if route.startswith("/api/") and route != "/api/v1/":
            assert client.generic("FOO", fill_route(route, things)).status_code == 405, route


@pytest.mark.parametrize("path", ["/health", "/api/v1/openapi.json"])
def test_a_post_to_a_public_page_is_a_405_also_without_csrf_token(path):
    assert Client(enforce_csrf_checks=True).post(path).status_code == 405


@pytest.mark.parametrize("path", ["/api/v1/runs", "/api/v1/people/me", "/api/v1/openapi.json"])
def test_what_answers_a_get_answers_a_head(as_alice, path):
    assert as_alice.get(path).status_code == 200
    answer = as_alice.head(path)
    assert (answer.status_code, answer.content) == (200, b"")


def test_an_operation_that_only_changes_takes_no_head(as_alice):
    assert as_alice.head("/api/v1/runs/plan").status_code == 405


def test_the_admin_site_uses_the_password_page_of_the_site(client, people):
    client.force_login(people["admin"])
    assert client.get("/admin/password_change/")["Location"] == "/account/password"
    form = client.get(f"/admin/people/user/{people['alice'].pk}/password/").content.decode()
    assert "password1" in form and "old_password" not in form
