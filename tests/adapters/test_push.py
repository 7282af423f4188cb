"""A version is pushed to a hub as it lies on the shelf, and the token is kept nowhere."""

import pytest
import yaml

from adapters.export import hub as export_hub
from adapters.lanes import PROGRAMS
from tests.adapters import fake_hub
from tests.registry import register_version
from training.catalog.models import BaseModel, Source
from training.errors import Conflict, UserError
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


def test_its_files_and_card_lie_on_the_hub_and_the_page_tells_where(as_alice, version, hub_server):
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
    assert hub_server.files  # the second push is one, too


def test_the_token_is_kept_nowhere(as_alice, version, hub_server):
    job = push_version(as_alice, version)
    assert TOKEN not in str(job.params)
    assert TOKEN not in as_alice.get(f"/adapters/{version.pk}").content.decode()
    assert not [
        path
        for path in job.folder.rglob("*")
        if path.is_file() and TOKEN in path.read_text(errors="replace")
    ]


def test_a_hub_gets_only_a_base_that_it_knows(as_alice, version, hub_server):
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
def test_what_the_hub_refuses_is_told_in_a_sentence(as_alice, version, hub_server, status, message):
    hub_server.status = status
    job = push_version(as_alice, version)
    assert job.state == JobState.FAILED
    assert message in job.error
    hub_server.status = 200
    assert push_version(as_alice, version).state == JobState.DONE


def test_a_hub_that_is_not_there_is_told(as_alice, version, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert "cannot be reached" in push_version(as_alice, version).error


def test_a_push_that_broke_off_asks_for_the_token_again(alice, version):
    job = export_hub.push_to_hub(alice, version, repository="alice/lights", token=TOKEN)
    job.params.pop("token")
    job.save()
    run_lane(PROGRAMS)
    job.refresh_from_db()
    assert "push again" in job.error


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"repository": "lights"}, "owner/name"),
        ({"repository": "../../etc"}, "owner/name"),
        ({"repository": "alice/" + "x" * 100}, "owner/name"),
        ({"token": "with a space"}, "access token"),
        ({"token": "a\nheader: b"}, "access token"),
        ({"what": "all"}, "must be one of"),
    ],
)
def test_what_cannot_be_pushed_is_refused_at_once(alice, version, more, message):
    with pytest.raises(UserError, match=message):
        export_hub.push_to_hub(
            alice, version, **({"repository": "alice/lights", "token": TOKEN} | more)
        )


def test_the_merged_model_has_to_be_there(alice, version):
    with pytest.raises(Conflict, match="Merge this version"):
        export_hub.push_to_hub(
            alice, version, repository="alice/lights", token=TOKEN, what="merged"
        )
