"""Who may go where: every address of the site against everybody in the cast, so that a new one without an entry fails."""

import json

import pytest
from django.urls import get_resolver

from adapters.models import AdapterVersion
from snapml_site.api import api
from training.people.tokens import create_token

pytestmark = pytest.mark.django_db
OPEN = {"sign-in", "sign-out", "health"}
# Addresses of things: only the owner, the team and admins. The rest of the pages is for everybody who is signed in.
OWNED = {
    "run",
    "run-header",
    "run-stop",
    "run-continue",
    "run-log",
    "run-files",
    "dataset",
    "adapter",
    "adapter-download",
    "adapter-heldout",
    "adapter-try",
}
SHARED = {
    "runs",
    "run-new",
    "datasets",
    "dataset-new",
    "dataset-example",
    "models",
    "model",
    "model-add",
    "model-retry",
    "adapters",
    "password",
    "account",
    "token-new",
    "token-revoke",
    "strip",
}


@pytest.fixture
def things(run, base_model, data, alice):
    files = {"adapter_model.safetensors": {"sha256": "a", "bytes": 1}, "adapter_config.json": {"sha256": "b", "bytes": 1}}
    adapter = AdapterVersion.objects.create(
        owner=alice,
        team=run.team,
        name="Lights",
        number=1,
        base_model=base_model,
        run=run,
        method="lora",
        step=1,
        size_bytes=2,
        files=files,
    )
    adapter.folder.mkdir(parents=True, exist_ok=True)
    for name in files:
        (adapter.folder / name).write_text("x")
    return {
        "run_id": run.pk,
        "dataset_id": data.dataset_id,
        "adapter_id": adapter.pk,
        "model_id": base_model.pk,
        "token_id": 1,
        "key": "smart_home",
    }


def pages():
    found = {}
    for pattern in get_resolver().url_patterns:
        for inner in getattr(pattern, "url_patterns", [pattern]):
            if getattr(pattern, "namespace", None) != "api":
                found[inner.name] = inner.pattern
    return found


def address(name, things):
    from django.urls import reverse

    wanted = {key: things[key] for key in pages()[name].converters}
    return reverse(name, kwargs=wanted)


def test_every_page_has_its_place_in_the_table():
    assert set(pages()) == OPEN | OWNED | SHARED


@pytest.mark.parametrize("name", sorted(OWNED | SHARED))
def test_strangers_are_sent_to_sign_in(client, things, name):
    for ask in (client.get, client.post):
        answer = ask(address(name, things))
        assert answer.status_code == 302
        assert answer["Location"].startswith("/sign-in?next=/")


@pytest.mark.parametrize("name", sorted(OWNED))
@pytest.mark.parametrize(("who", "may"), [("alice", True), ("bob", True), ("root", True), ("mallory", False)])
def test_things_are_for_their_owner_the_team_and_admins(client, people, things, name, who, may):
    client.force_login(people.get(who, people["admin"]))
    ask = client.post if name in ("run-stop", "run-continue", "adapter-try") else client.get
    answer = ask(address(name, things), content_type="application/json", data={"who": "base"})
    assert (answer.status_code == 404) is not may


@pytest.mark.parametrize("name", ["runs", "datasets", "adapters"])
def test_lists_show_only_what_one_may_see(client, people, things, name):
    seen = {}
    for who in ("alice", "mallory"):
        client.force_login(people[who])
        seen[who] = "Lights" in client.get(address(name, things)).content.decode()
    assert seen == {"alice": True, "mallory": False}


def test_the_strip_names_a_run_only_to_those_who_may_see_it(client, people, run):
    run.state = "running"
    run.save()
    for who, sees in (("bob", True), ("mallory", False)):
        client.force_login(people[who])
        assert ("Lights, tiny" in client.get("/strip").content.decode()) is sees


# --- the API


def operations():
    schema = api.get_openapi_schema()
    for path, methods in schema["paths"].items():
        for method in methods:
            yield method, path


def test_the_api_is_described():
    assert {path.split("/")[3] for _, path in operations()} == {"models", "datasets", "runs", "adapters"}


def call(client, method, path, things, **headers):
    for key, value in things.items():
        path = path.replace("{" + key + "}", str(value))
    body = {"model": things["model_id"], "data": 1} if path.endswith("/runs") else {}
    return client.generic(method.upper(), path, data=json.dumps(body), content_type="application/json", **headers)


@pytest.mark.parametrize(("method", "path"), list(operations()))
def test_the_api_knows_nobody_without_a_token_or_with_a_wrong_one(client, things, method, path):
    for headers in ({}, {"HTTP_AUTHORIZATION": "Bearer snapml_wrong"}):
        answer = call(client, method, path, things, **headers)
        assert answer.status_code == 401
        assert answer.json()["error"]["message"].startswith("Sign in")


@pytest.mark.parametrize(("method", "path"), [o for o in operations() if "{" in o[1] and "models" not in o[1]])
def test_the_api_gives_things_to_their_people_only(client, people, things, method, path):
    for who, may in (("alice", True), ("bob", True), ("admin", True), ("mallory", False)):
        _, secret = create_token(people[who], "test")
        answer = call(client, method, path, things, HTTP_AUTHORIZATION=f"Bearer {secret}")
        assert (answer.status_code == 404) is not may, (who, answer.content)


@pytest.mark.parametrize(("method", "path"), [o for o in operations() if o[0] != "get"])
def test_a_cookie_alone_does_not_act_from_another_site(things, people, method, path):
    from django.test import Client

    client = Client(enforce_csrf_checks=True)
    client.force_login(people["alice"])
    assert call(client, method, path, things).status_code == 403


def test_a_token_of_a_one_time_password_opens_nothing(client, alice):
    _, secret = create_token(alice, "x")
    alice.must_change_password = True
    alice.save()
    assert client.get("/api/v1/runs", HTTP_AUTHORIZATION=f"Bearer {secret}").status_code == 401


@pytest.mark.parametrize(
    "path", ["/runs/%2e%2e%2f1", "/runs/1%00", "/data/..%2f..%2fetc", "/adapters/%252e%252e", "/static/../manage.py"]
)
def test_no_address_leads_out(as_alice, path):
    assert as_alice.get(path).status_code == 404
