"""Rules for every URL of pages, API and admin site, also for those that are added later."""

import pytest
from django.contrib.auth.hashers import MD5PasswordHasher

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


def test_the_admin_site_uses_the_password_page_of_the_site(client, people):
    client.force_login(people["admin"])
    assert client.get("/admin/password_change/")["Location"] == "/account/password"
    form = client.get(f"/admin/people/user/{people['alice'].pk}/password/").content.decode()
    assert "password1" in form and "old_password" not in form
