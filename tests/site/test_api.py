import json

import pytest

from tests import tiny
from tests.runs.journals import Journal, step_event
from training.people.tokens import create_token
from training.runs.models import Run
from training.runs.worker.ingest import store_events
from training.runs.worker.lease import claim_run

pytestmark = pytest.mark.django_db


@pytest.fixture
def api(client, alice):
    _, secret = create_token(alice, "test")

    def call(method, path, body=None):
        raw = json.dumps(body) if body is not None else ""
        answer = client.generic(
            method,
            f"/api/v1{path}",
            raw,
            content_type="application/json",
            HTTP_AUTHORIZATION=f"Bearer {secret}",
        )
        return answer.status_code, answer.json()

    return call


def test_a_run_from_launch_to_stop(api, base_model, data, no_queue):
    code, run = api(
        "POST",
        "/runs",
        {
            "model": base_model.pk,
            "data": data.pk,
            "settings": tiny.SETTINGS,
            "name": "Mine",
            "accept_warnings": True,
        },
    )
    assert code == 201
    assert (run["name"], run["owner"], run["state"]["state"]) == ("Mine", "alice", "queued")
    assert api("GET", f"/runs/{run['id']}")[1] == run
    assert [r["id"] for r in api("GET", "/runs?state=queued")[1]["items"]] == [run["id"]]
    assert api("POST", f"/runs/{run['id']}/stop", {})[1]["state"]["state"] == "cancelled"
    assert api("POST", f"/runs/{run['id']}/stop", {})[0] == 409


def test_events_are_paginated_and_curves_are_downsampled(api, run):
    lease, record, journal = claim_run(run.pk), Run.objects.get(pk=run.pk), Journal()
    store_events(lease, record, journal.lines(*[step_event(n, 1 / n) for n in range(1, 1001)]), 1)
    sequence_numbers, after = [], 0
    while True:
        _, answer = api("GET", f"/runs/{run.pk}/events?after={after}&limit=300")
        if not answer["events"]:
            break
        sequence_numbers += [event["seq"] for event in answer["events"]]
        after = answer["last_seq"]
    assert sequence_numbers == list(range(1, 1001))
    _, curves = api("GET", f"/runs/{run.pk}/metrics?points=50&names=loss")
    assert len(curves["axes"]["step"]) == 50
    assert curves["series"]["loss"]["high"][0] == 1.0
    assert list(curves["series"]) == ["loss"]


def test_models_and_datasets_are_listed(api, base_model, data):
    assert api("GET", "/models")[1]["items"][0]["metadata"]["layers"] == 2
    assert api("GET", f"/models/{base_model.pk}")[1]["name"] == "tiny-llama"
    assert api("GET", "/datasets")[1]["items"][0]["versions"][0]["id"] == data.pk
    assert api("GET", f"/datasets/{data.dataset_id}")[1]["name"] == "Lights"


@pytest.mark.parametrize(
    ("method", "path", "body", "code", "field"),
    [
        ("POST", "/runs", {"model": 1}, 422, "data"),
        ("POST", "/runs", {"model": 99, "data": 1}, 404, "model"),
        ("POST", "/runs", {"model": 10**30, "data": 1}, 400, "model"),
        ("POST", "/runs", {"model": "{m}", "data": 999}, 404, "data"),
        ("POST", "/runs", {"model": "{m}", "data": "{d}", "settings": {"rank": 0}}, 400, "rank"),
        (
            "POST",
            "/runs",
            {"model": "{m}", "data": "{d}", "settings": {"rank": 10**400}},
            400,
            "rank",
        ),
        (
            "POST",
            "/runs",
            {"model": "{m}", "data": "{d}", "settings": {"dropout": 10**400}},
            400,
            "dropout",
        ),
        (
            "POST",
            "/runs",
            {"model": "{m}", "data": "{d}", "settings": {"model": "/etc"}},
            400,
            "model",
        ),
        ("POST", "/runs", {"model": "{m}", "data": "{d}", "owner": 3}, 422, "owner"),
        ("POST", "/runs", {"model": "{m}", "data": "{d}", "lease_token": "x"}, 422, "lease_token"),
        ("GET", "/runs?state=dreaming", None, 400, "state"),
        ("GET", "/runs?limit=0", None, 422, "limit"),
        ("GET", "/runs?offset=" + "9" * 30, None, 422, "offset"),
        ("GET", "/runs/{r}/events?after=-1", None, 422, "after"),
        ("GET", "/runs/{r}/metrics?names=password", None, 400, "names"),
        ("GET", "/runs/" + "9" * 30, None, 404, ""),
        ("GET", "/nothing", None, 404, ""),
    ],
)
def test_every_error_has_the_same_format_and_the_right_status(
    api, run, base_model, data, method, path, body, code, field
):
    text = json.dumps(body).replace('"{m}"', str(base_model.pk)).replace('"{d}"', str(data.pk))
    status, answer = api(method, path.replace("{r}", str(run.pk)), json.loads(text))
    assert status == code
    assert set(answer) == {"error"}
    assert answer["error"]["message"]
    if field:
        assert answer["error"]["field"].endswith(field)


def test_unknown_query_parameters_are_ignored(api, run):
    plain = api("GET", "/runs")
    assert api("GET", "/runs?owner__password__startswith=p&order_by=owner__email") == plain


def test_an_internal_error_has_the_same_format_without_details(api, run, monkeypatch):
    monkeypatch.setattr("training.runs.api.read_curves", lambda *a, **k: 1 / 0)
    code, answer = api("GET", f"/runs/{run.pk}/metrics")
    assert code == 500
    assert "ZeroDivision" not in str(answer)
