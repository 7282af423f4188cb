import pytest
from django.core.management import CommandError, call_command

from snapml_site.first_admin import prepare_first_admin
from tests.user_errors import raises_user_error
from training.errors import NotFound
from training.people.models import ApiToken, User
from training.people.tokens import create_token, find_token, revoke_token


def sign_in(client, name="alice", password="a-long-word-1"):
    return client.post("/sign-in", {"username": name, "password": password})


def test_signing_in_and_out(client, people):
    assert sign_in(client)["Location"] == "/"
    assert client.get("/").status_code == 200
    client.post("/sign-out")
    assert client.get("/")["Location"].startswith("/sign-in")


def test_a_failed_sign_in_does_not_reveal_whether_the_name_exists(client, people):
    wrong = [sign_in(client, name, "nope").content.decode() for name in ("alice", "nobody")]
    assert all("Wrong username or password" in page for page in wrong)


def test_too_many_failed_sign_ins_are_blocked(client, people):
    for _ in range(10):
        sign_in(client, password="nope")
    response = sign_in(client)
    assert response.status_code == 429
    assert "Wait 5 minutes" in response.content.decode()


@pytest.mark.parametrize("name", ["alice", " alice ", "ALICE", "\uff41lice"])
def test_other_spellings_of_the_name_count_as_the_same(client, people, name):
    for _ in range(10):
        sign_in(client, password="nope")
    assert sign_in(client, name).status_code == 429


def test_a_session_gets_a_new_key_at_sign_in(client, people):
    client.get("/sign-in")
    client.session.save()
    before = client.session.session_key
    sign_in(client)
    assert client.session.session_key != before


@pytest.mark.parametrize(
    "next_url", ["https://evil.example/", "//evil.example", "javascript:alert(1)"]
)
def test_sign_in_redirects_to_no_other_site(client, people, next_url):
    response = client.post(
        "/sign-in", {"username": "alice", "password": "a-long-word-1", "next": next_url}
    )
    assert response["Location"] == "/"


def test_the_first_admins_one_time_password_must_be_changed(client, db):
    message = prepare_first_admin()
    password = message.rsplit(" ", 1)[1].rstrip(")")
    sign_in(client, "admin", password)
    assert client.get("/")["Location"] == "/account/password"
    assert client.get("/api/v1/runs").status_code == 401
    new = {
        "old_password": password,
        "new_password1": "tulip-river-42",
        "new_password2": "tulip-river-42",
    }
    assert client.post("/account/password", new)["Location"] == "/"
    assert client.get("/").status_code == 200
    assert prepare_first_admin() == "(sign in with your password)"


def test_an_unused_one_time_password_is_replaced_at_the_next_start(db):
    assert prepare_first_admin() != prepare_first_admin()
    assert User.objects.count() == 1


def test_a_weak_password_is_rejected_with_the_reason(client, people):
    sign_in(client)
    new = {
        "old_password": "a-long-word-1",
        "new_password1": "12345678",
        "new_password2": "12345678",
    }
    assert "entirely numeric" in client.post("/account/password", new).content.decode()


def test_a_token_is_stored_as_a_hash_and_can_be_revoked(alice):
    token, secret = create_token(alice, "laptop")
    assert find_token(secret).user == alice
    assert secret not in str(ApiToken.objects.values())
    revoke_token(alice, token.pk)
    assert find_token(secret) is None


def test_users_cannot_revoke_each_others_tokens(people):
    token, secret = create_token(people["alice"], "laptop")
    with pytest.raises(NotFound):
        revoke_token(people["mallory"], token.pk)
    assert find_token(secret).user == people["alice"]


def test_the_token_of_an_inactive_user_is_invalid(alice):
    _, secret = create_token(alice, "laptop")
    alice.is_active = False
    alice.save()
    assert find_token(secret) is None


def test_a_token_waits_for_the_change_of_the_one_time_password(alice, client, capsys):
    alice.must_change_password = True
    alice.save()
    call_command("token", "alice")
    printed = capsys.readouterr()
    secret = printed.out.strip()
    with raises_user_error(code="password_not_changed", naming=("alice", "one-time password")):
        find_token(secret)
    answer = client.get("/api/v1/models", headers={"Authorization": f"Bearer {secret}"})
    assert answer.status_code == 401
    assert answer.json()["error"]["message"] == printed.err.strip()
    alice.must_change_password = False
    alice.save()
    assert find_token(secret).user == alice


def test_the_account_page_shows_a_new_token_once(as_alice):
    response = as_alice.post("/account/tokens", {"name": "laptop"})
    assert "snapml_" in response.content.decode()
    assert "no-store" in response["Cache-Control"]
    page = as_alice.get("/account").content.decode()
    assert "snapml_" not in page
    assert "laptop" in page


def test_the_token_command_prints_a_token_or_lists_the_users(alice, capsys):
    call_command("token", "alice")
    assert find_token(capsys.readouterr().out.strip()).user == alice
    with pytest.raises(CommandError, match="Users: alice"):
        call_command("token", "nobody")
