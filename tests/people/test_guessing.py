"""Passwords are guessed slowly, one user cannot lock out the others, and names are not revealed."""

import ipaddress
import os
import re
import subprocess
import sys

import pytest
from django.contrib.auth.hashers import MD5PasswordHasher
from django.test import RequestFactory

from training.people.models import User
from training.people.requests import get_client_address

pytestmark = pytest.mark.django_db
PASSWORD = "a-long-word-1"
STRANGER = {"REMOTE_ADDR": "198.51.100.7"}
LOOPBACK = {"REMOTE_ADDR": "127.0.0.1"}


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


@pytest.fixture
def proxies(settings):
    networks = ("127.0.0.1", "::1", "10.0.0.0/8", "2001:db8:1::/48")
    settings.PROXIES = [ipaddress.ip_network(network) for network in networks]


def test_a_stranger_behind_a_proxy_locks_out_no_other_address(client, people, proxies):
    stranger, other = (
        {**LOOPBACK, "HTTP_X_FORWARDED_FOR": address} for address in ("198.51.100.7", "192.0.2.1")
    )
    for _ in range(11):
        code = sign_in(client, "alice", "guess", **stranger)
    assert code == 429
    assert sign_in(client, "alice", PASSWORD, **other) == 302


def test_a_stranger_behind_an_unknown_proxy_locks_out_only_a_name(client, people):
    for number in range(120):
        sign_in(client, f"user-{number}", "guess", **LOOPBACK)
    assert sign_in(client, "alice", PASSWORD, **LOOPBACK) == 302
    for number in range(11):
        code = sign_in(client, "bob", "guess", **LOOPBACK, HTTP_X_FORWARDED_FOR=f"192.0.2.{number}")
    assert code == 429
    assert sign_in(client, "alice", PASSWORD, **LOOPBACK) == 302


def test_a_client_with_a_whole_ipv6_network_is_counted_as_one(client, people):
    for number in range(11):
        address = {"REMOTE_ADDR": f"2001:db8:5:6::{number}"}
        code = sign_in(client, "alice", "guess", **address)
    assert code == 429


@pytest.mark.parametrize(
    ("remote", "header", "address"),
    [
        ("198.51.100.7", "192.0.2.1", "198.51.100.7"),
        ("127.0.0.1", "1.1.1.1, 192.0.2.1", "192.0.2.1"),
        ("::1", "2001:db8::1", "2001:db8::/64"),
        ("10.0.0.5", "192.0.2.1", "192.0.2.1"),
        ("10.0.0.5", "1.1.1.1, 192.0.2.1, 10.0.0.6,10.9.9.9", "192.0.2.1"),
        ("10.0.0.5", "192.0.2.1, 2001:db8:1::7", "192.0.2.1"),
        ("10.0.0.5", "192.0.2.1, unknown, 10.0.0.6", ""),
        ("10.0.0.5", "192.0.2.1,", ""),
        ("10.0.0.5", "127.0.0.2", ""),
        ("10.0.0.5", "10.0.0.6", ""),
        ("10.0.0.5", "192.0.2.1:4711", "192.0.2.1"),
        ("10.0.0.5", "[2001:db8::1]:4711", "2001:db8::/64"),
        ("10.0.0.5", "[2001:db8::1]", "2001:db8::/64"),
        ("10.0.0.5", "fe80::1%eth0", "fe80::/64"),
        ("10.0.0.5", "::ffff:192.0.2.1", "192.0.2.1"),
        ("10.0.0.5", "[::1", ""),
        ("10.0.0.5", "x" * 9000, ""),
        ("::ffff:10.0.0.5", "192.0.2.1", "192.0.2.1"),
        ("::ffff:198.51.100.7", "192.0.2.1", "198.51.100.7"),
        ("127.0.0.1", "", ""),
        ("127.0.0.2", "192.0.2.1", ""),
        ("", "192.0.2.1", ""),
    ],
)
def test_the_address_is_read_only_from_a_trusted_proxy(proxies, remote, header, address):
    request = RequestFactory().get("/", REMOTE_ADDR=remote, HTTP_X_FORWARDED_FOR=header)
    assert get_client_address(request) == address


@pytest.mark.parametrize("remote", ["127.0.0.1", "::1", "::ffff:127.0.0.1"])
def test_a_loopback_address_that_is_not_configured_is_unknown(settings, remote):
    settings.PROXIES = []
    request = RequestFactory().get("/", REMOTE_ADDR=remote, HTTP_X_FORWARDED_FOR="192.0.2.1")
    assert get_client_address(request) == ""


@pytest.mark.parametrize("value", ["nginx", "10.0.0.1/8", "10.0.0.0/33"])
def test_a_proxy_that_is_no_address_stops_the_start_and_is_named(tmp_path, value):
    environment = {**os.environ, "SNAPML_HOME": str(tmp_path), "SNAPML_PROXIES": f"::1, {value}"}
    command = [sys.executable, "-c", "import snapml_site.settings"]
    start = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    assert start.returncode != 0
    last_line = start.stderr.strip().splitlines()[-1]
    assert "SNAPML_PROXIES" in last_line and value in last_line


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
