"""The inference server over HTTP with the `openai` client: token, limits and OpenAI's format."""

import asyncio
import json
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import openai
import pytest
import uvicorn
from starlette.requests import Request
from starlette.testclient import TestClient

from adapters.inference import openai_http
from adapters.inference.__main__ import start_scheduler
from adapters.inference.batch import Batch
from adapters.inference.request_queue import RequestQueue
from adapters.inference.scheduler import BatchScheduler
from adapters.inference.server import make_app
from adapters.inference.types import QueueFull

ROOT = Path(__file__).parents[2]
BODY = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "snapml": {"base": "/base"}}
HEADERS = {"Authorization": "Bearer secret"}


class FakeQueue:
    """A request queue whose scheduler answers each request at once with a fixed text."""

    count = 0
    max_requests = 99

    def __init__(self):
        self.requests = []

    def submit_request(self, request):
        if len(self.requests) >= self.max_requests:
            raise QueueFull("64 requests are in progress.")
        self.requests.append(request)
        for event in (
            {"status": "loading the base model"},
            {"text": "he"},
            {"text": "llo"},
            {"done": "stop", "prompt_tokens": 3, "completion_tokens": 2, "tokens_per_second": 9.0},
        ):
            request.events.put(event)


@pytest.fixture
def fake_queue():
    return FakeQueue()


@pytest.fixture
def web(fake_queue):
    return TestClient(make_app(fake_queue, "secret"))


@pytest.fixture
def serve():
    """Starts a server for a request queue on a free port and returns the `openai` client for it."""
    servers = []

    def start_server(request_queue):
        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        config = uvicorn.Config(make_app(request_queue, "secret"), log_level="warning")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        servers.append((server, thread))
        while not server.started:
            time.sleep(0.01)
        port = listener.getsockname()[1]
        return openai.OpenAI(
            base_url=f"http://127.0.0.1:{port}/v1", api_key="secret", max_retries=0
        )

    yield start_server
    for server, thread in servers:
        server.should_exit = True
        thread.join(10)


def test_the_openai_client_gets_a_complete_and_a_streamed_answer(serve, tiny_model):
    request_queue = RequestQueue()
    start_scheduler(request_queue)
    client = serve(request_queue)
    location = {"extra_body": {"snapml": {"base": str(tiny_model)}}}
    body = {
        "model": "tiny",
        "messages": BODY["messages"],
        "max_tokens": 8,
        "temperature": 0,
        **location,
    }
    completion = client.chat.completions.create(**body)
    assert completion.choices[0].finish_reason in ("stop", "length")
    assert (
        completion.usage.total_tokens
        == completion.usage.prompt_tokens + completion.usage.completion_tokens
    )
    chunks = list(
        client.chat.completions.create(**body, stream=True, stream_options={"include_usage": True})
    )
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == completion.choices[0].message.content
    assert chunks[-1].usage == completion.usage
    # The server knows the model's location now, so the name alone is enough.
    prompts_answer = client.completions.create(
        model="tiny", prompt=["turn on", "the lamp"], max_tokens=4, temperature=0
    )
    assert [choice.index for choice in prompts_answer.choices] == [0, 1]
    assert [model.id for model in client.models.list()] == ["tiny"]
    with pytest.raises(openai.BadRequestError, match="context length is 256 tokens"):
        client.chat.completions.create(**{**body, "max_tokens": 4000})


def test_the_server_imports_no_torch_before_the_first_request():
    code = (
        "import sys, adapters.inference.server, adapters.inference.request_queue; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_a_disconnect_frees_the_slot(serve, tiny_model, monkeypatch):
    scheduler = BatchScheduler(RequestQueue())
    threading.Thread(target=scheduler.run_forever, daemon=True).start()
    client = serve(scheduler.request_queue)
    location = {"extra_body": {"snapml": {"base": str(tiny_model)}}}
    client.chat.completions.create(
        model="tiny", messages=BODY["messages"], max_tokens=1, **location
    )
    decode_step = Batch.decode_step
    monkeypatch.setattr(
        Batch, "decode_step", lambda *args: (time.sleep(0.2), decode_step(*args))[1]
    )
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.5).chat.completions.create(
            model="tiny", messages=BODY["messages"], max_tokens=200, temperature=0, **location
        )
    deadline = time.monotonic() + 10
    while scheduler.request_queue.count and time.monotonic() < deadline:
        time.sleep(0.05)
    assert scheduler.request_queue.count == 0


def test_an_unknown_model_is_a_404_in_openais_format(serve, fake_queue):
    client = serve(fake_queue)
    with pytest.raises(openai.NotFoundError) as error_info:
        client.chat.completions.create(model="unknown", messages=BODY["messages"])
    assert error_info.value.code == "model_not_found"


def test_a_complete_answer(web):
    response = web.post("/v1/chat/completions", json=BODY, headers=HEADERS).json()
    assert response["choices"][0]["message"] == {"role": "assistant", "content": "hello"}
    assert response["usage"] == {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}


def test_a_streamed_answer_ends_with_done_and_cancels_its_request(web, fake_queue):
    text = web.post("/v1/chat/completions", json={**BODY, "stream": True}, headers=HEADERS).text
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    events = [json.loads(line) for line in lines[:-1]]
    assert events[1]["snapml"]["status"] == "loading the base model"
    texts = [choice["delta"].get("content", "") for event in events for choice in event["choices"]]
    assert "".join(texts) == "hello"
    assert fake_queue.requests[0].cancelled.is_set()


@pytest.mark.parametrize(
    "headers", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret2"}]
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_every_endpoint_requires_the_token(web, headers, path):
    assert web.post(path, json=BODY, headers=headers).status_code == 401
    assert web.get("/v1/models", headers=headers).status_code == 401


def test_a_full_queue_is_a_429_with_retry_after_and_cancels_all_prompts(web, fake_queue):
    fake_queue.max_requests = 1
    response = web.post("/v1/completions", json={**BODY, "prompt": ["a", "b"]}, headers=HEADERS)
    assert (response.status_code, response.headers["Retry-After"]) == (429, "5")
    assert fake_queue.requests[0].cancelled.is_set()


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": [3]}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
        ({"max_tokens": "x"}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"seed": True}, "seed"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"n": 2}, "n"),
        ({"tools": [{}]}, "tools"),
    ],
)
def test_an_unsupported_value_is_rejected_with_the_name_of_the_field(web, change, param):
    response = web.post("/v1/chat/completions", json={**BODY, **change}, headers=HEADERS)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


@pytest.mark.parametrize(
    "body",
    [
        "{nope",
        "[]",
        "[" * 100_000,
        '{"temperature": NaN}',
        '{"stop": "\\ud83d"}',
        '{"stream_options": 3}',
    ],
)
def test_a_body_that_is_no_json_object_is_rejected(web, body):
    assert web.post("/v1/chat/completions", content=body, headers=HEADERS).status_code == 400


def test_a_body_above_the_limit_is_rejected(web):
    assert (
        web.post("/v1/chat/completions", content=b"x" * 1_000_001, headers=HEADERS).status_code
        == 413
    )


def test_reading_a_body_stops_at_the_limit():
    reads = []

    async def receive():
        reads.append(1)
        return {"type": "http.request", "body": b"x" * 100_000, "more_body": True}

    with pytest.raises(openai_http.HttpError) as error_info:
        asyncio.run(openai_http.read_body(Request({"type": "http"}, receive)))
    assert (error_info.value.status, len(reads)) == (413, 11)


def test_openai_http_imports_neither_django_nor_torch():
    code = (
        "import sys, adapters.inference.openai_http; "
        "sys.exit('torch' in sys.modules or 'django' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_health_reports_the_number_of_open_requests(web):
    assert web.get("/health").json() == {"active_requests": 0}
