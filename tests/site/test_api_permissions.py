"""The permission matrix: every operation of the API, from its OpenAPI schema, for every kind of
user. An operation without a row fails.

One letter per user: y is allowed, l may only view (403), n gets 404. An allowed operation may still
fail with 409 or 422, which is not tested here.
"""

import json

import pytest
from django.core.files.uploadedfile import SimpleUploadedFile
from django.test import Client

from snapml_site.api import api
from training.people.tokens import create_token

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("no_program")]
USERS = ("anonymous", "mallory", "vera", "bob", "lea", "alice", "admin")
ALL = dict.fromkeys(USERS[1:], "y")  # every signed-in user
READ = {**ALL, "mallory": "n"}  # users who may see the object
CHANGE = {"mallory": "n", "vera": "l", "bob": "l", "lea": "y", "alice": "y", "admin": "y"}
ADMIN = {**dict.fromkeys(USERS[1:6], "l"), "admin": "y"}
# mallory leads her own team
LEADS = {
    **dict.fromkeys(USERS[1:], "l"),
    "lea": "y",
    "mallory": "y",
    "admin": "y",
}
LEAD = {"mallory": "n", "vera": "l", "bob": "l", "lea": "y", "alice": "l", "admin": "y"}
# Objects without a team: only for their owner
MINE = {
    **dict.fromkeys(USERS[1:], "n"),
    "alice": "y",
}

MATRIX = {
    "get /people/me": ALL,
    # Whether they may share with team voice
    "patch /people/me": {**ALL, "vera": "l", "mallory": "l", "admin": "l"},
    "get /people/me/tokens": ALL,
    "post /people/me/tokens": dict.fromkeys(USERS[1:], "l"),  # a token cannot create tokens
    "delete /people/me/tokens/{token_id}": MINE,
    "get /people/me/webhooks": ALL,
    "post /people/me/webhooks": dict.fromkeys(USERS[1:], "l"),
    "delete /people/me/webhooks/{webhook_id}": MINE,
    "get /people/teams": ALL,
    "post /people/teams": ADMIN,
    "get /people/teams/{team_id}": READ,
    "get /people/teams/{team_id}/members": READ,
    "put /people/teams/{team_id}/members/{username}": LEAD,
    # bob leaves the team
    "delete /people/teams/{team_id}/members/{username}": {**LEAD, "bob": "y"},
    "get /models": ALL,
    "post /models": ADMIN,
    "get /models/{model_id}": ALL,
    "post /models/{model_id}/retry": ADMIN,
    "get /datasets": ALL,
    "post /datasets/examples/{key}": ALL,
    "get /datasets/uploads": ALL,
    "post /datasets/uploads": ALL,
    "post /datasets/uploads/hub": ALL,
    "get /datasets/uploads/{upload_id}": READ,
    "delete /datasets/uploads/{upload_id}": CHANGE,
    "patch /datasets/uploads/{upload_id}": CHANGE,
    "get /datasets/uploads/{upload_id}/preview": READ,
    "post /datasets/uploads/{upload_id}/check": CHANGE,
    "post /datasets/uploads/{upload_id}/save": CHANGE,
    "get /datasets/versions/{version_id}/rows": READ,
    "get /datasets/{dataset_id}": READ,
    "get /datasets/{dataset_id}/versions": READ,
    "patch /datasets/{dataset_id}": CHANGE,
    "delete /datasets/{dataset_id}": CHANGE,
    "get /runs/settings": ALL,
    "post /runs/forecast": READ,
    "get /runs/lengths": READ,
    "post /runs/plan": READ,
    "post /runs/forecast/model": ALL,
    "post /runs": {**READ, "vera": "l"},  # a viewer cannot train on the team's data
    "get /runs": ALL,
    "post /runs/sweeps": {**READ, "vera": "l"},
    "get /runs/sweeps/{sweep_id}": READ,
    "post /runs/sweeps/{sweep_id}/stop": CHANGE,
    "get /runs/tokens": READ,
    "get /runs/queue": ALL,
    "post /runs/queue/dry-run/{pool_id}": ADMIN,
    "post /runs/{run_id}/up": CHANGE,
    "get /runs/{run_id}/memory-options": READ,
    "post /runs/{run_id}/memory-options/{name}": CHANGE,
    "post /runs/{run_id}/priority": CHANGE,
    "post /runs/{run_id}/pool": CHANGE,
    "get /runs/{run_id}": READ,
    "patch /runs/{run_id}": CHANGE,
    "delete /runs/{run_id}": CHANGE,
    "post /runs/{run_id}/stop": CHANGE,
    "post /runs/{run_id}/continue": CHANGE,
    "get /runs/{run_id}/config": READ,
    "get /runs/{run_id}/events": READ,
    "get /runs/{run_id}/evals": READ,
    "get /runs/{run_id}/metrics": READ,
    "get /gpus/devices": ALL,
    "post /gpus/devices/{device_id}/return": ADMIN,
    "get /gpus/pools": ALL,
    "patch /gpus/pools/{pool_id}": ADMIN,
    "get /gpus/pools/{pool_id}/quotas": LEADS,
    "put /gpus/pools/{pool_id}/quotas": ADMIN,
    "post /gpus/pools/{pool_id}/hold": ADMIN,
    "get /gpus/people/{username}/quota": ADMIN,
    "put /gpus/people/{username}/quota": ADMIN,
    "get /gpus/disk": ALL,
    "put /gpus/people/{username}/disk-quota": ADMIN,
    "put /gpus/teams/{team_id}/disk-quota": ADMIN,
    "get /gpus/usage": LEADS,
    "get /gpus/audit": LEADS,
    "get /gpus/audit/intact": ADMIN,
    "get /adapters": ALL,
    "get /adapters/{adapter_id}": READ,
    "get /adapters/{adapter_id}/held-out": READ,
    "get /adapters/{adapter_id}/download": READ,
    "post /adapters/{adapter_id}/try": READ,
    "post /adapters/import": ALL,
    # The run has no such checkpoint
    "post /adapters/checkpoints": {**CHANGE, "lea": "n", "alice": "n", "admin": "n"},
    "post /adapters/{adapter_id}/merge": CHANGE,
    "post /adapters/{adapter_id}/gguf": CHANGE,
    "post /adapters/{adapter_id}/push": CHANGE,
    "get /adapters/{adapter_id}/gguf": READ,
    # These were not started
    "get /adapters/{adapter_id}/merge": dict.fromkeys(USERS[1:], "n"),
    "get /adapters/{adapter_id}/push": dict.fromkeys(USERS[1:], "n"),
    "patch /adapters/{adapter_id}": CHANGE,
    "delete /adapters/{adapter_id}": CHANGE,
    "post /adapters/{adapter_id}/continue": {**READ, "vera": "l"},
    "get /comparisons/prompts": ALL,
    "post /comparisons/prompts": ALL,
    "get /comparisons/prompts/{prompts_id}/replies": READ,
    "delete /comparisons/prompts/{prompts_id}": CHANGE,
    "post /comparisons/replies": READ,
    "get /comparisons": READ,
    "get /comparisons/weights": READ,
    "post /comparisons/votes": READ,
    "get /deployments": ALL,
    "post /deployments": {**READ, "vera": "l"},
    "get /deployments/{name}": READ,
    "get /deployments/{name}/history": READ,
    "post /deployments/{name}/switch": CHANGE,
    "post /deployments/{name}/roll-back": CHANGE,
    "delete /deployments/{name}": CHANGE,
}
BODIES = {
    "post /people/me/tokens": {"name": "x"},
    "post /adapters/{adapter_id}/try": {
        "who": "base",
        "messages": [{"role": "user", "content": "a"}],
    },
    "post /people/me/webhooks": {"url": "https://198.51.100.7/x"},
    "post /people/teams": {"name": "new"},
    "put /people/teams/{team_id}/members/{username}": {"role": "viewer"},
    "post /models": {"source": "hub", "location": "a/b"},
    "post /datasets/uploads/hub": {"hub_id": "a/b"},
    "patch /datasets/uploads/{upload_id}": {
        "row_format": "messages",
        "columns": {"messages": "messages"},
    },
    "patch /datasets/{dataset_id}": {"name": "New"},
    "delete /datasets/{dataset_id}": {"name": "x"},
    "delete /runs/{run_id}": {"name": "x"},
    "post /runs/{run_id}/priority": {"priority": "background"},
    "patch /gpus/pools/{pool_id}": {"runs_per_device": 2},
    "put /gpus/pools/{pool_id}/quotas": {"team": None, "limit": 1},
    "post /runs/queue/dry-run/{pool_id}": {"team": None, "limit": 1},
    "post /gpus/pools/{pool_id}/hold": {"is_on_hold": True, "is_pool_wide": True},
    "put /gpus/people/{username}/quota": {"max_running": 2},
    "put /gpus/people/{username}/disk-quota": {"max_bytes": 10**9},
    "put /gpus/teams/{team_id}/disk-quota": {"max_bytes": 10**9},
    "delete /adapters/{adapter_id}": {"name": "x"},
    "post /comparisons/prompts": {"text": "hello"},
    "post /adapters/{adapter_id}/push": {"repository": "alice/lights", "token": "hf_0123456789"},
    "post /adapters/{adapter_id}/gguf": {"quantization": "f16"},
}


def list_operations():
    for path, methods in api.get_openapi_schema()["paths"].items():
        for method in methods:
            yield f"{method} {path.removeprefix('/api/v1')}"


def build_body(operation, things):
    launch = {
        "model": things["model_id"],
        "data": things["version_id"],
        "settings": {"max_steps": 3},
        "accept_warnings": True,
    }
    first, second = things["adapter_id"], things["other_id"]
    prompts = things["prompts_id"]
    vote = {"prompts": prompts, "first": first, "second": second, "row": 0, "choice": "left"}
    bodies = BODIES | {
        "post /runs": launch,
        "post /runs/sweeps": launch,
        "post /runs/forecast": launch,
        "patch /people/me": {"default_team": things["team_id"]},
        "post /runs/plan": {"model": things["model_id"], "data": things["version_id"]},
        "post /runs/{run_id}/pool": {"pool": things["pool_id"]},
        "post /adapters/checkpoints": {"run": things["run_id"], "step": 1},
        "post /comparisons/replies": {"versions": [first, second], "prompts": prompts},
        "post /comparisons/votes": vote,
        "post /deployments": {"version": first, "name": "new"},
        "post /deployments/{name}/switch": {"version": first},
    }
    return bodies.get(operation, {})


def build_path(operation, things):
    path = operation.split(" ")[1]
    for key, value in things.items():
        path = path.replace("{" + key + "}", str(value))
    versions = f"?v={things['adapter_id']}&v={things['other_id']}"
    lengths = f"?model={things['model_id']}&data={things['version_id']}"
    queries = {
        "get /comparisons": versions,
        "get /comparisons/weights": versions,
        "delete /deployments/{name}": "?confirm=x",
        "get /adapters/{adapter_id}/gguf": "?quantization=f16",
        "get /adapters/{adapter_id}/push": "?repository=alice/lights",
        "get /runs/lengths": lengths,
        "get /runs/tokens": lengths,
    }
    return f"/api/v1{path}{queries.get(operation, '')}"


def call_operation(client, operation, things, who):
    path = build_path(operation, things)
    headers = {"HTTP_AUTHORIZATION": f"Bearer {who}"} if who else {}
    if operation == "post /adapters/import":
        file = SimpleUploadedFile("a.zip", b"no zip")
        form = {"file": file, "base": things["model_id"], "name": "x"}
        return client.post(path, form, **headers)
    if operation == "post /datasets/uploads":
        return client.post(path, {"rows": '{"prompt": "a", "completion": "b"}'}, **headers)
    method = operation.split(" ")[0].upper()
    body = json.dumps(build_body(operation, things))
    return client.generic(method, path, body, content_type="application/json", **headers)


def test_every_operation_is_in_the_matrix():
    assert set(list_operations()) == set(MATRIX)


@pytest.mark.parametrize("operation", sorted(MATRIX))
def test_permissions_match_the_matrix(client, people, things, operation):
    expected = {"anonymous": 401, "y": None, "l": 403, "n": 404}
    token, _ = create_token(people["alice"], "hers")
    things = {**things, "token_id": token.pk}
    assert call_operation(client, operation, things, "").status_code == 401
    # Allowed users last: they change things
    for who in sorted(USERS[1:], key=lambda name: MATRIX[operation][name] == "y"):
        _, secret = create_token(people[who], "test")
        answer = call_operation(client, operation, things, secret)
        expected_status = expected[MATRIX[operation][who]]
        if expected_status is not None:
            assert answer.status_code == expected_status, (who, answer.content)
        elif who == next(name for name in USERS[1:] if MATRIX[operation][name] == "y"):
            assert answer.status_code not in (401, 403, 404), (who, answer.content)
        assert answer.status_code < 500, (who, answer.content)


@pytest.mark.parametrize("operation", sorted(o for o in MATRIX if not o.startswith("get")))
def test_a_read_only_token_cannot_change_anything(client, alice, things, operation):
    _, secret = create_token(alice, "reader", "read")
    answer = call_operation(client, operation, things, secret)
    assert (answer.status_code, answer.json()["error"]["message"][:24]) == (
        403,
        "This token is read-only.",
    )


@pytest.mark.parametrize("operation", sorted(o for o in MATRIX if not o.startswith("get")))
def test_a_session_cookie_without_csrf_token_is_rejected(people, things, operation):
    client = Client(enforce_csrf_checks=True)
    client.force_login(people["alice"])
    assert call_operation(client, operation, things, "").status_code == 403


@pytest.mark.parametrize("operation", sorted(MATRIX))
def test_an_invalid_token_is_rejected(people, things, operation):
    for is_signed_in in (False, True):
        client = Client(enforce_csrf_checks=True)
        if is_signed_in:
            client.force_login(people["alice"])
        answer = call_operation(client, operation, things, "snapml_wrong")
        assert answer.status_code == 401
        assert answer.json()["error"]["message"].startswith("Sign in")


def test_a_change_without_token_and_session_is_a_401(db):
    client = Client(enforce_csrf_checks=True)
    client.cookies["snapml_session"] = "ended"
    assert client.post("/api/v1/runs", {}, content_type="application/json").status_code == 401


def test_a_failed_csrf_check_of_the_api_is_logged_once(people, caplog):
    client = Client(enforce_csrf_checks=True)
    client.force_login(people["alice"])
    client.post("/api/v1/runs", {}, content_type="application/json")
    assert [record.name for record in caplog.records] == ["django.security.csrf"]


def test_a_session_works_behind_a_proxy_with_basic_authentication(as_alice):
    header = {"HTTP_AUTHORIZATION": "Basic YTpi"}
    assert as_alice.get("/api/v1/people/me", **header).status_code == 200
