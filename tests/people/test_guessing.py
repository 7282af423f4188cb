"""Passwords are guessed slowly, one user cannot lock out the others, and names are not revealed."""

import re

import pytest
from django.contrib.auth.hashers import MD5PasswordHasher
from django.test import RequestFactory

from training.people.models import User
from training.people.requests import get_client_address

pytestmark = pytest.mark.django_db
PASSWORD = "a-long-word-1"
STRANGER = {"REMOTE_ADDR": "198.51.100.7"}
PROXIED = {"REMOTE_ADDR": "127.0.0.1"}


def sign_in(client, name, password, **environment):
    response = client.post("/sign-in", {"username": name, "password": password}, **environment)
    client.logout()
    return response.status_code


def test_signing_in_does_not_reset_the_count_of_an_address(client, people):
    codes = []
    for number in range(105):
        if number % 9 == 0:
            sign_in(client, "mallory", PASSWORD, **STRANGER)
        codes.append(sign_in(client, f"user-{number}", "guess", **STRANGER))
    assert codes.index(429) == 100
    assert sign_in(client, "alice", PASSWORD, **STRANGER) == 429


def test_many_people_may_sign_in_from_one_address(client, people):
    for _ in range(120):
        assert sign_in(client, "alice", PASSWORD, **STRANGER) == 302


def test_a_stranger_behind_the_same_proxy_does_not_lock_out_others(client, people):
    for number in range(120):
        sign_in(client, f"user-{number}", "guess", **PROXIED)
    assert sign_in(client, "alice", PASSWORD, **PROXIED) == 302
    stranger, other = (
        {**PROXIED, "HTTP_X_FORWARDED_FOR": address} for address in ("198.51.100.7", "192.0.2.1")
    )
    for _ in range(11):
        code = sign_in(client, "alice", "guess", **stranger)
    assert code == 429
    assert sign_in(client, "alice", PASSWORD, **other) == 302


@pytest.mark.parametrize(
    ("remote", "header", "address"),
    [
        ("198.51.100.7", "192.0.2.1", "198.51.100.7"),
        ("127.0.0.1", "1.1.1.1, 192.0.2.1", "192.0.2.1"),
        ("::1", "2001:db8::1", "2001:db8::1"),
        ("10.0.0.5", "192.0.2.1", "192.0.2.1"),
        ("127.0.0.1", "", ""),
        ("", "192.0.2.1", ""),
    ],
)
def test_the_address_is_read_only_from_a_trusted_proxy(settings, remote, header, address):
    settings.PROXIES = ["10.0.0.5"]
    request = RequestFactory().get("/", REMOTE_ADDR=remote, HTTP_X_FORWARDED_FOR=header)
    assert get_client_address(request) == address


def test_a_known_and_an_unknown_name_give_the_same_page_after_the_same_work(
    client, people, monkeypatch
):
    hashed = []
    encode = MD5PasswordHasher.encode

    def count_work(self, password, salt):
        hashed.append(password)
        return encode(self, password, salt)

    monkeypatch.setattr(MD5PasswordHasher, "encode", count_work)
    User.objects.create_user("former", password=PASSWORD, is_active=False)
    hashed.clear()
    pages = set()
    for name in ("alice", "nobody", "former"):
        response = client.post("/sign-in", {"username": name, "password": PASSWORD + "x"})
        page = response.content.decode().replace(f'value="{name}"', "")
        pages.add(re.sub(r"[\w+/=-]{20,}", "", page))  # random in each page
        assert hashed == [PASSWORD + "x"]
        hashed.clear()
    assert len(pages) == 1


def test_the_old_password_is_guessed_as_slowly(client, people):
    client.force_login(people["alice"])
    new = {"new_password1": "tulip-river-42", "new_password2": "tulip-river-42"}
    for _ in range(10):
        assert client.post("/account/password", {"old_password": "x", **new}).status_code == 200
    assert client.post("/account/password", {"old_password": PASSWORD, **new}).status_code == 429


def test_a_mistyped_new_password_is_no_guess(client, people):
    client.force_login(people["alice"])
    new = {"new_password1": "tulip-river-42", "new_password2": "tulip-river-43"}
    for _ in range(12):
        client.post("/account/password", {"old_password": PASSWORD, **new})
    new["new_password2"] = new["new_password1"]
    assert client.post("/account/password", {"old_password": PASSWORD, **new}).status_code == 302
