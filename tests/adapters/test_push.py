"""Pushing a version to a model hub, without storing the token."""

import pytest
import yaml

from adapters.export import hub as export_hub
from adapters.lanes import PROGRAMS
from tests.adapters import fake_hub
from tests.registry import register_version
from tests.user_errors import raises_user_error
from training.catalog.models import BaseModel, Source
from training.errors import Conflict
from training.jobs.models import Job, JobState
from training.jobs.runner import run_lane

TOKEN = "hf_a-secret-of-alice"
CARD = (
    "---\nbase_model: Tiny\ntags:\n- snapml\nlibrary_name: peft\n---\n\n# Lights\n\nwith --- "
    "in it\n"
)


@pytest.fixture
def hub_server(monkeypatch):
    with fake_hub.run_hub() as server:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        yield server


@pytest.fixture
def version(run):
    registered = register_version(run, weights=b"weights" * 1000)
    (registered.folder / "README.md").write_text(CARD)
    return registered


def push_version(client, version, **more):
    form = {"repository": "alice/lights", "token": TOKEN, "what": "adapter", "private": "on"} | more
    assert client.post(f"/adapters/{version.pk}/push", form).status_code == 302
    run_lane(PROGRAMS)
    return Job.objects.get()


def test_files_and_card_are_pushed_and_the_page_links_to_them(as_alice, version, hub_server):
    job = push_version(as_alice, version)
    assert (job.state, job.error) == (JobState.DONE, "")
    assert hub_server.files.keys() == {
        "adapter_model.safetensors",
        "adapter_config.json",
        "README.md",
    }
    assert hub_server.files["adapter_model.safetensors"] == b"weights" * 1000
    assert hub_server.created[0]["visibility"] == "private"
    assert hub_server.tokens == {f"Bearer {TOKEN}"}
    page = as_alice.get(f"/adapters/{version.pk}").content.decode()
    assert "Pushed adapter to" in page
    assert f"http://127.0.0.1:{hub_server.server_port}/alice/lights" in page
    hub_server.files.clear()
    push_version(as_alice, version)
    assert hub_server.files  # a second push runs again


def test_the_token_is_not_stored(as_alice, version, hub_server):
    job = push_version(as_alice, version)
    assert TOKEN not in str(job.params)
    assert TOKEN not in as_alice.get(f"/adapters/{version.pk}").content.decode()
    assert not [
        path
        for path in job.folder.rglob("*")
        if path.is_file() and TOKEN in path.read_text(errors="replace")
    ]


def test_the_card_names_the_base_only_if_the_hub_has_it(as_alice, version, hub_server):
    push_version(as_alice, version)
    _, header, text = hub_server.files["README.md"].decode().split("---\n", 2)
    assert yaml.safe_load(header) == {"tags": ["snapml"], "library_name": "peft"}
    assert text == "\n# Lights\n\nwith --- in it\n"
    BaseModel.objects.update(source=Source.HUB, location="owner/tiny")
    push_version(as_alice, version)
    header = yaml.safe_load(hub_server.files["README.md"].decode().split("---\n", 2)[1])
    assert (header["base_model"], header["base_model_relation"]) == ("owner/tiny", "adapter")


@pytest.mark.parametrize(
    ("status", "message"),
    [(401, "token is invalid"), (403, "no write access"), (500, "status 500")],
)
def test_an_error_of_the_hub_fails_the_job_with_its_reason(
    as_alice, version, hub_server, status, message
):
    hub_server.status = status
    job = push_version(as_alice, version)
    assert job.state == JobState.FAILED
    assert message in job.error
    hub_server.status = 200
    assert push_version(as_alice, version).state == JobState.DONE


def test_an_unreachable_hub_fails_the_job(as_alice, version, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert "cannot be reached" in push_version(as_alice, version).error


def test_an_interrupted_push_needs_the_token_again(alice, version):
    job = export_hub.push_to_hub(alice, version, repository="alice/lights", token=TOKEN)
    job.params.pop("token")
    job.save()
    run_lane(PROGRAMS)
    job.refresh_from_db()
    assert job.state == JobState.FAILED
    assert "token" in job.error


@pytest.mark.parametrize(
    ("more", "field"),
    [
        ({"repository": "lights"}, "repository"),
        ({"repository": "../../etc"}, "repository"),
        ({"repository": "alice/" + "x" * 100}, "repository"),
        ({"token": "with a space"}, "token"),
        ({"token": "a\nheader: b"}, "token"),
        ({"what": "all"}, "what"),
    ],
)
def test_an_invalid_push_is_rejected_at_its_field(alice, version, more, field):
    with raises_user_error(field=field):
        export_hub.push_to_hub(
            alice, version, **({"repository": "alice/lights", "token": TOKEN} | more)
        )


def test_pushing_the_merged_model_needs_a_merge(alice, version):
    with raises_user_error(Conflict, code="not_merged"):
        export_hub.push_to_hub(
            alice, version, repository="alice/lights", token=TOKEN, what="merged"
        )
