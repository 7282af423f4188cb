"""The gateway under `/v1/`, tested with the `openai` client, the site and a user's token."""

import asyncio
import json
import socket
import threading
import time
from types import SimpleNamespace

import httpx
import openai
import pytest
import torch
import uvicorn
from asgiref.sync import sync_to_async

from adapters.export import merge
from adapters.inference import loaded_model
from adapters.inference.__main__ import start_scheduler
from adapters.inference.request_queue import RequestQueue
from adapters.inference.server import make_app
from adapters.models import RequestLog, UsageCounter
from adapters.serving import gateway, inference_client, services
from adapters.serving.services import Routing
from snapml_site.asgi import application
from tests.registry import train_version
from training.people.models import Scope
from training.people.tokens import create_token

pytestmark = pytest.mark.django_db(transaction=True)
MESSAGES = [{"role": "user", "content": "turn on the hall lamp"}]
REQUEST = {"model": "lights", "messages": MESSAGES, "temperature": 0, "max_tokens": 8}


@pytest.fixture
def inference(settings, monkeypatch):
    """The real inference server, in a thread, at INFERENCE_URL."""
    monkeypatch.setattr(loaded_model, "get_fastest_dtype", lambda *_: torch.float32)
    request_queue = RequestQueue()
    start_scheduler(request_queue)
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(make_app(request_queue, "secret"), log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    settings.INFERENCE_URL, settings.INFERENCE_TOKEN = (
        f"http://127.0.0.1:{listener.getsockname()[1]}",
        "secret",
    )
    yield request_queue
    server.should_exit = True
    thread.join(10)


@pytest.fixture
def versions(alice, base_model, data, device, no_queue, engine_once):
    return [
        train_version(alice, base_model, data, engine_once, name="Lights", seed=seed)
        for seed in (1, 2)
    ]


@pytest.fixture
def deployed(alice, versions):
    return services.create_deployment(alice, "lights", Routing(versions[0], use_merged=False))


def create_client(user, scope=Scope.WRITE):
    return create_client_with_token(create_token(user, "test", scope)[1])


def create_client_with_token(secret):
    transport = httpx.AsyncClient(transport=httpx.ASGITransport(app=application))
    return openai.AsyncOpenAI(
        base_url="http://testserver/v1", api_key=secret, http_client=transport, max_retries=0
    )


def get_text(answer):
    return answer.choices[0].message.content


async def test_a_deployment_answers_with_and_without_streaming_and_counts_requests(
    alice, versions, deployed, inference
):
    client = await sync_to_async(create_client)(alice)
    assert [model.id async for model in client.models.list()] == ["lights"]
    completion = await client.chat.completions.create(**REQUEST)
    assert completion.model == "lights"
    chunks = [chunk async for chunk in await client.chat.completions.create(**REQUEST, stream=True)]
    assert "".join(
        choice.delta.content or "" for chunk in chunks for choice in chunk.choices
    ) == get_text(completion)
    assert {chunk.model for chunk in chunks} == {"lights"}
    assert not any(chunk.usage for chunk in chunks)
    text_completion = await client.completions.create(
        model="lights", prompt="turn on", max_tokens=3, temperature=0
    )
    assert text_completion.choices[0].text
    tally = await UsageCounter.objects.aget()
    assert (tally.answers, tally.failures, tally.version_id) == (3, 0, versions[0].pk)
    assert tally.completion_tokens == completion.usage.completion_tokens * 2 + 3
    assert await RequestLog.objects.filter(first_token_seconds__gt=0).acount() == 1


async def test_a_switch_under_load_neither_drops_requests_nor_mixes_versions(
    alice, versions, deployed, inference
):
    client = await sync_to_async(create_client)(alice)
    expected = []
    for version in versions:
        await sync_to_async(services.switch_deployment)(
            alice, deployed, Routing(version, use_merged=False)
        )
        expected.append(get_text(await client.chat.completions.create(**REQUEST)))
    assert expected[0] != expected[1]

    async def send_request(number):
        await asyncio.sleep(0.02 * number)
        return get_text(await client.chat.completions.create(**REQUEST))

    async def switch_versions():
        for number in range(8):
            await asyncio.sleep(0.1)
            await sync_to_async(services.switch_deployment)(
                alice, deployed, Routing(versions[number % 2], use_merged=False)
            )

    *answers, _ = await asyncio.gather(
        *(send_request(number) for number in range(40)), switch_versions()
    )
    assert set(answers) == set(expected)
    await sync_to_async(services.switch_deployment)(
        alice, deployed, Routing(versions[0], use_merged=False)
    )
    # The next request, not some time later
    assert get_text(await client.chat.completions.create(**REQUEST)) == expected[0]


async def test_users_without_access_get_openai_errors_that_reveal_nothing(
    people, deployed, settings
):
    settings.INFERENCE_URL = "http://127.0.0.1:9"
    mallory = await sync_to_async(create_client)(people["mallory"])
    assert [model.id async for model in mallory.models.list()] == []
    with pytest.raises(openai.NotFoundError) as caught:
        await mallory.chat.completions.create(**REQUEST)
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.AuthenticationError):
        await create_client_with_token("snapml_wrong").chat.completions.create(**REQUEST)
    with pytest.raises(openai.AuthenticationError):
        await create_client_with_token("snapml_wrong").models.list()


async def test_a_token_before_the_change_of_the_one_time_password_is_told_so(alice, deployed):
    client = await sync_to_async(create_client)(alice)
    alice.must_change_password = True
    await alice.asave()
    with pytest.raises(openai.AuthenticationError, match="one-time password") as caught:
        await client.models.list()
    assert caught.value.code == "password_not_changed"


async def test_a_read_only_token_can_send_requests(alice, deployed, inference):
    client = await sync_to_async(create_client)(alice, Scope.READ)
    assert get_text(await client.chat.completions.create(**REQUEST))


async def test_without_an_inference_server_the_request_fails_and_is_counted(
    alice, deployed, settings
):
    settings.INFERENCE_URL = "http://127.0.0.1:9"
    client = await sync_to_async(create_client)(alice)
    with pytest.raises(openai.InternalServerError, match="is down"):
        await client.chat.completions.create(**REQUEST)
    assert (await UsageCounter.objects.aget()).failures == 1


async def test_clients_cannot_set_paths_of_weights(alice, deployed, inference, tmp_path):
    client = await sync_to_async(create_client)(alice)
    answer = await client.chat.completions.create(
        **REQUEST, extra_body={"snapml": {"base": "/etc", "adapter": str(tmp_path)}}
    )
    assert get_text(answer)
    assert not hasattr(answer, "snapml")


async def test_errors_of_the_inference_server_reach_the_client_unchanged(
    alice, deployed, inference
):
    client = await sync_to_async(create_client)(alice)
    with pytest.raises(openai.BadRequestError, match="context length is 256 tokens"):
        await client.chat.completions.create(**{**REQUEST, "max_tokens": 5000})
    assert (
        not await UsageCounter.objects.aexists()
        or (await UsageCounter.objects.aget()).failures == 0
    )


async def test_a_stream_that_fails_before_its_first_token_is_an_error_with_a_status(
    alice, deployed, inference
):
    client = await sync_to_async(create_client)(alice)
    with pytest.raises(openai.BadRequestError) as caught:
        await client.chat.completions.create(**{**REQUEST, "max_tokens": 5000}, stream=True)
    assert caught.value.code == "context_length_exceeded"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/v1/embeddings", 404),
        ("GET", "/v1", 404),
        ("GET", "/v1/models/a/b", 404),
        ("DELETE", "/v1/models", 405),
    ],
)
async def test_an_unknown_url_is_an_error_in_openais_format(method, path, status):
    transport = httpx.ASGITransport(app=application)
    async with httpx.AsyncClient(transport=transport, base_url="http://testserver") as web:
        answer = await web.request(method, path)
    assert answer.status_code == status
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("model", [None, "", 7, ["lights"]])
async def test_a_request_without_the_name_of_a_deployment_is_rejected(alice, deployed, model):
    client = await sync_to_async(create_client)(alice)
    with pytest.raises(openai.BadRequestError) as caught:
        await client.chat.completions.create(**REQUEST, extra_body={"model": model})
    assert caught.value.param == "model"


async def test_a_bug_is_an_error_in_openais_format(alice, monkeypatch):
    def fail(_user):
        raise RuntimeError("a bug")

    monkeypatch.setattr(gateway, "list_deployment_models", fail)
    secret = (await sync_to_async(create_token)(alice, "test"))[1]
    transport = httpx.ASGITransport(app=application, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://testserver") as web:
        answer = await web.get("/v1/models", headers={"Authorization": f"Bearer {secret}"})
    assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")


async def test_fields_between_the_site_and_the_inference_server_are_rejected(alice, deployed):
    client = await sync_to_async(create_client)(alice)
    with pytest.raises(openai.BadRequestError) as caught:
        await client.chat.completions.create(**REQUEST, extra_body={"prompt_logprobs": 1})
    assert caught.value.param == "prompt_logprobs"


@pytest.mark.parametrize(
    "error",
    [
        httpx.Response(400, json={"object": "error", "message": "too long", "code": 400}),
        httpx.Response(502, text="<html>Bad Gateway</html>"),
        httpx.Response(500, json=["no"]),
    ],
)
async def test_errors_of_other_servers_get_openais_format(
    alice, deployed, settings, monkeypatch, error
):
    settings.INFERENCE_URL = "http://other"
    secret = (await sync_to_async(create_token)(alice, "test"))[1]
    other = httpx.MockTransport(lambda _request: error)
    web = httpx.AsyncClient(
        transport=httpx.ASGITransport(app=application),
        base_url="http://testserver",
        headers={"Authorization": f"Bearer {secret}"},
    )
    stub = {**vars(httpx), "AsyncClient": lambda **_: httpx.AsyncClient(transport=other)}
    monkeypatch.setattr(inference_client, "httpx", SimpleNamespace(**stub))
    answer = await web.post("/v1/chat/completions", json=REQUEST)
    assert answer.status_code == error.status_code
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


# Python's JSON parser accepts these, others do not.
NOT_JSON = (b'{"model": "lights", "temperature": NaN}', b'{"model": "lights", "stop": "\\ud83d"}')


async def test_malformed_requests_are_rejected(alice, deployed):
    secret = (await sync_to_async(create_token)(alice, "test"))[1]
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app=application), base_url="http://testserver"
    ) as web:
        for body in (b"{nope", b"[]", b'{"stream_options": 3}', b"[" * 100_000, *NOT_JSON):
            answer = await web.post(
                "/v1/chat/completions", content=body, headers={"Authorization": f"Bearer {secret}"}
            )
            assert (answer.status_code, body) == (400, body)
        large = await web.post(
            "/v1/completions",
            content=b"x" * 1_000_001,
            headers={"Authorization": f"Bearer {secret}"},
        )
        assert large.status_code == 413


async def test_a_vllm_server_loads_an_unknown_adapter_and_gets_the_request_again(
    alice, deployed, versions, settings, monkeypatch
):
    """vLLM goes by model names and has `/v1/load_lora_adapter`."""
    known, paths = set(), []

    def vllm(request):
        body = json.loads(request.content)
        paths.append(request.url.path)
        if request.url.path == "/v1/load_lora_adapter":
            known.add(body["lora_name"])
            assert body["lora_path"] == str(versions[0].folder)
            return httpx.Response(200, text="Success")
        if body["model"] not in known:
            return httpx.Response(404, json={"error": {"message": "no such model"}})
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": "hello"},
            "finish_reason": "stop",
        }
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        payload = {
            "id": "x",
            "object": "chat.completion",
            "created": 1,
            "model": body["model"],
            "choices": [choice],
            "usage": usage,
        }
        return httpx.Response(200, json=payload)

    settings.INFERENCE_URL = "http://vllm"
    client = await sync_to_async(create_client)(alice)
    stub = {
        **vars(httpx),
        "AsyncClient": lambda **_: httpx.AsyncClient(transport=httpx.MockTransport(vllm)),
    }
    monkeypatch.setattr(inference_client, "httpx", SimpleNamespace(**stub))
    assert get_text(await client.chat.completions.create(**REQUEST)) == "hello"
    assert get_text(await client.chat.completions.create(**REQUEST)) == "hello"
    assert paths == [
        "/v1/chat/completions",
        "/v1/load_lora_adapter",
        "/v1/chat/completions",
        "/v1/chat/completions",
    ]


async def test_a_merged_deployment_is_sent_to_another_server_as_its_adapter(
    alice, deployed, versions, settings, monkeypatch
):
    """Other servers do not have the merged model; base and adapter give the same answers."""
    loaded = []

    def vllm(request):
        body = json.loads(request.content)
        if request.url.path == "/v1/load_lora_adapter":
            loaded.append(body["lora_path"])
            return httpx.Response(200, text="Success")
        if not loaded:
            return httpx.Response(404, json={"error": {"message": "no such model"}})
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": "hello"},
            "finish_reason": "stop",
        }
        payload = {
            "id": "x",
            "object": "chat.completion",
            "created": 1,
            "model": body["model"],
            "choices": [choice],
        }
        return httpx.Response(200, json=payload)

    monkeypatch.setattr(merge, "is_merged", lambda version: True)
    assert "adapter" not in inference_client.get_model_location(versions[0], use_merged=True)
    await sync_to_async(type(deployed).objects.update)(use_merged=True)
    settings.INFERENCE_URL = "http://vllm"
    client = await sync_to_async(create_client)(alice)
    stub = {
        **vars(httpx),
        "AsyncClient": lambda **_: httpx.AsyncClient(transport=httpx.MockTransport(vllm)),
    }
    monkeypatch.setattr(inference_client, "httpx", SimpleNamespace(**stub))
    assert get_text(await client.chat.completions.create(**REQUEST)) == "hello"
    assert loaded == [str(versions[0].folder)]


async def test_client_errors_and_overload_are_not_counted_as_answers(
    alice, deployed, settings, monkeypatch
):
    settings.INFERENCE_URL = "http://busy"
    statuses = iter([400, 429])
    busy = httpx.MockTransport(
        lambda _request: httpx.Response(next(statuses), json={"error": {"message": "no"}})
    )
    stub = {**vars(httpx), "AsyncClient": lambda **_: httpx.AsyncClient(transport=busy)}
    client = await sync_to_async(create_client)(alice)
    monkeypatch.setattr(inference_client, "httpx", SimpleNamespace(**stub))
    with pytest.raises(openai.BadRequestError):
        await client.chat.completions.create(**REQUEST)
    with pytest.raises(openai.RateLimitError):
        await client.chat.completions.create(**REQUEST)
    tally = await UsageCounter.objects.aget()
    assert (tally.answers, tally.failures) == (0, 1)


async def test_a_deployment_is_retrieved_by_name_like_an_openai_model(alice, people, deployed):
    client = await sync_to_async(create_client)(alice)
    assert (await client.models.retrieve("lights")).id == "lights"
    with pytest.raises(openai.NotFoundError):
        await (await sync_to_async(create_client)(people["mallory"])).models.retrieve("lights")
