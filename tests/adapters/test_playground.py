"""An adapter's page: the playground, held-out prompts and the download."""

import io
import json
import zipfile

import httpx
import pytest
from asgiref.sync import async_to_sync

from adapters.models import file_stem
from adapters.serving import inference_client, playground
from tests.registry import register_version

pytestmark = pytest.mark.django_db


@pytest.fixture
def adapter(run):
    return register_version(run, name="Lamps ☀ \r\n", number=2, weights=b"weights" * 100_000)


BODY = {"who": "adapter", "messages": [{"role": "user", "content": "hi"}]}


def test_the_request_uses_the_adapters_folder_whatever_the_body_says(alice, adapter, base_model):
    request = playground.build_request(
        alice, adapter, {**BODY, "snapml": {"base": "/etc", "user": "bob"}, "adapter": "/etc"}
    )
    location = {
        "base": str(base_model.folder),
        "quantized": False,
        "adapter": str(adapter.folder),
        "sha256": "a",
        "user": "alice",
    }
    assert request["snapml"] == location
    assert playground.build_request(alice, adapter, {**BODY, "who": "base"})["snapml"] == {
        "base": str(base_model.folder),
        "quantized": False,
        "user": "alice",
    }


@pytest.mark.parametrize(
    ("change", "fact"),
    [
        ({"messages": []}, "message"),
        ({"messages": "hi"}, "message"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "role"),
        ({"messages": [{"role": "user", "content": "x" * 30_000}]}, "20,000 characters"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "c"}]}, "tool_call_id"),
        ({"who": "stranger"}, "base or adapter"),
        ({"temperature": 9}, "from 0 to 2"),
        ({"temperature": "hot"}, "from 0 to 2"),
        ({"top_p": 0}, "from 0.01 to 1"),
        ({"top_p": float("nan")}, "finite"),
        ({"max_tokens": True}, "from 1 to 2048"),
    ],
)
def test_an_invalid_request_is_rejected_at_its_field(as_alice, adapter, change, fact):
    answer = as_alice.post(
        f"/adapters/{adapter.pk}/try",
        json.dumps({**BODY, **change}),
        "application/json",
        HTTP_ACCEPT="application/json",
    )
    assert answer.status_code == 400
    assert answer.json()["error"]["field"] == next(iter(change))
    assert fact in answer.json()["error"]["message"]


@pytest.mark.parametrize("body", ["{nope", "[]", '"x"'])
def test_a_body_that_is_not_a_json_object_is_rejected(as_alice, adapter, body):
    answer = as_alice.post(
        f"/adapters/{adapter.pk}/try", body, "application/json", HTTP_ACCEPT="application/json"
    )
    assert answer.status_code == 400


def test_a_form_instead_of_json_is_rejected(as_alice, adapter):
    answer = as_alice.post(f"/adapters/{adapter.pk}/try", BODY, HTTP_ACCEPT="application/json")
    assert answer.status_code == 400


async def read_bytes(chunks):
    return b"".join([piece async for piece in chunks])


async def read_text(chunks):
    return (await read_bytes(chunks)).decode()


async def test_without_an_inference_server_the_stream_is_an_error(settings):
    settings.INFERENCE_URL = "http://127.0.0.1:9"
    assert "is down" in await read_text(playground.stream_answer({}))
    settings.INFERENCE_URL = ""
    assert "is down" in await read_text(playground.stream_answer({}))


async def test_a_busy_inference_server_streams_its_error(settings, monkeypatch):
    settings.INFERENCE_URL = "http://127.0.0.1:9"
    busy = httpx.MockTransport(
        lambda _r: httpx.Response(429, json={"error": {"message": "8 are being answered."}})
    )
    client = httpx.AsyncClient
    monkeypatch.setattr(inference_client.httpx, "AsyncClient", lambda **_k: client(transport=busy))
    assert "Busy: 8 are being answered." in await read_text(playground.stream_answer({}))


def test_the_zip_has_the_unchanged_files_under_a_safe_name(as_alice, adapter):
    answer = as_alice.get(f"/adapters/{adapter.pk}/download")
    assert answer["Content-Disposition"] == 'attachment; filename="Lamps-v2.zip"'
    archive = zipfile.ZipFile(io.BytesIO(async_to_sync(read_bytes)(answer.streaming_content)))
    assert archive.read("Lamps-v2/adapter_model.safetensors") == b"weights" * 100_000
    assert len(archive.namelist()) == 2


def test_a_name_without_letters_still_gives_a_file_name(adapter):
    adapter.name = '"; ☀'
    assert file_stem(adapter) == "adapter-v2"


def test_a_held_out_prompt_comes_with_its_expected_answer(as_alice, adapter):
    row = as_alice.get(f"/adapters/{adapter.pk}/held-out").json()
    assert row["expected"]
    assert row["messages"][-1]["role"] == "user"


def test_the_data_behind_a_shared_adapter_stays_with_its_owner(client, people, adapter):
    adapter.team = people["mallory"].get_sharing_team()
    adapter.save()
    client.force_login(people["mallory"])
    assert client.get(f"/adapters/{adapter.pk}").status_code == 200
    answer = client.get(f"/adapters/{adapter.pk}/held-out", HTTP_ACCEPT="application/json")
    assert answer.status_code == 404
    assert "not shared with you" in answer.json()["error"]["message"]


def test_the_adapter_list_is_grouped_by_base_model(as_alice, adapter):
    page = as_alice.get("/adapters").content.decode()
    assert "tiny-llama" in page
    assert "v2" in page
