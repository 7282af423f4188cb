"""The inference program over HTTP, asked with the `openai` client: its token, its limits, and
OpenAI's shape.
"""

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
from adapters.inference.__main__ import start_answering
from adapters.inference.batch import Batch
from adapters.inference.request_queue import Desk
from adapters.inference.scheduler import Speaker
from adapters.inference.server import make_app
from adapters.inference.types import Busy

ROOT = Path(__file__).parents[2]
BODY = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "snapml": {"base": "/base"}}
HEADERS = {"Authorization": "Bearer secret"}


class Parrot:
    """Says a fixed answer at once, as the speaker would."""

    count = 0
    busy_after = 99

    def __init__(self):
        self.asked = []

    def ask(self, question):
        if len(self.asked) >= self.busy_after:
            raise Busy("64 questions are being answered.")
        self.asked.append(question)
        for said in (
            {"status": "loading the base model"},
            {"text": "he"},
            {"text": "llo"},
            {"done": "stop", "prompt_tokens": 3, "completion_tokens": 2, "tokens_per_second": 9.0},
        ):
            question.said.put(said)


@pytest.fixture
def parrot():
    return Parrot()


@pytest.fixture
def web(parrot):
    return TestClient(make_app(parrot, "secret"))


@pytest.fixture
def serve():
    """Serve a speaker on a port of its own; gives the `openai` client for it."""
    servers = []

    def start(speaker):
        taken = socket.socket()
        taken.bind(("127.0.0.1", 0))
        config = uvicorn.Config(make_app(speaker, "secret"), log_level="warning")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [taken]}, daemon=True)
        thread.start()
        servers.append((server, thread))
        while not server.started:
            time.sleep(0.01)
        port = taken.getsockname()[1]
        return openai.OpenAI(
            base_url=f"http://127.0.0.1:{port}/v1", api_key="secret", max_retries=0
        )

    yield start
    for server, thread in servers:
        server.should_exit = True
        thread.join(10)


def test_the_openai_client_gets_a_real_models_answer_whole_and_streamed(serve, tiny_model):
    desk = Desk()
    start_answering(desk)
    client = serve(desk)
    place = {"extra_body": {"snapml": {"base": str(tiny_model)}}}
    asked = {
        "model": "tiny",
        "messages": BODY["messages"],
        "max_tokens": 8,
        "temperature": 0,
        **place,
    }
    whole = client.chat.completions.create(**asked)
    assert whole.choices[0].finish_reason in ("stop", "length")
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    chunks = list(
        client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage
    # By its name now
    plain = client.completions.create(
        model="tiny", prompt=["turn on", "the lamp"], max_tokens=4, temperature=0
    )
    assert [choice.index for choice in plain.choices] == [0, 1]
    assert [model.id for model in client.models.list()] == ["tiny"]
    with pytest.raises(openai.BadRequestError, match="context holds 256 tokens"):
        client.chat.completions.create(**{**asked, "max_tokens": 4000})


def test_the_program_holds_no_torch_until_it_is_asked():
    asked = (
        "import sys, adapters.inference.server, adapters.inference.request_queue; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", asked], cwd=ROOT, check=False).returncode == 0


def test_a_caller_who_goes_away_frees_the_place(serve, tiny_model, monkeypatch):
    speaker = Speaker(Desk())
    threading.Thread(target=speaker.speak_for_ever, daemon=True).start()
    client = serve(speaker.desk)
    place = {"extra_body": {"snapml": {"base": str(tiny_model)}}}
    client.chat.completions.create(model="tiny", messages=BODY["messages"], max_tokens=1, **place)
    step = Batch.step
    monkeypatch.setattr(Batch, "step", lambda *given: (time.sleep(0.2), step(*given))[1])
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.5).chat.completions.create(
            model="tiny", messages=BODY["messages"], max_tokens=200, temperature=0, **place
        )
    until = time.monotonic() + 10
    while speaker.desk.count and time.monotonic() < until:
        time.sleep(0.05)
    assert speaker.desk.count == 0


def test_a_model_that_nobody_named_is_openais_404(serve, parrot):
    client = serve(parrot)
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="stranger", messages=BODY["messages"])
    assert caught.value.code == "model_not_found"


def test_a_whole_answer(web):
    answer = web.post("/v1/chat/completions", json=BODY, headers=HEADERS).json()
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": "hello"}
    assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}


def test_a_streamed_answer_ends_with_done_and_tells_the_speaker_to_let_go(web, parrot):
    text = web.post("/v1/chat/completions", json={**BODY, "stream": True}, headers=HEADERS).text
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    pieces = [json.loads(line) for line in lines[:-1]]
    assert pieces[1]["snapml"]["status"] == "loading the base model"
    said = [choice["delta"].get("content", "") for piece in pieces for choice in piece["choices"]]
    assert "".join(said) == "hello"
    assert parrot.asked[0].hung_up.is_set()


@pytest.mark.parametrize(
    "headers", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret2"}]
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_without_its_token_it_answers_nothing(web, headers, path):
    assert web.post(path, json=BODY, headers=headers).status_code == 401
    assert web.get("/v1/models", headers=headers).status_code == 401


def test_when_it_is_busy_it_says_when_to_come_back_and_asks_none_of_several(web, parrot):
    parrot.busy_after = 1
    answer = web.post("/v1/completions", json={**BODY, "prompt": ["a", "b"]}, headers=HEADERS)
    assert (answer.status_code, answer.headers["Retry-After"]) == (429, "5")
    assert parrot.asked[0].hung_up.is_set()


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
def test_what_it_cannot_do_it_refuses_by_the_fields_name(web, change, param):
    answer = web.post("/v1/chat/completions", json={**BODY, **change}, headers=HEADERS)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


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
def test_what_is_no_json_object_is_refused(web, body):
    assert web.post("/v1/chat/completions", content=body, headers=HEADERS).status_code == 400


def test_a_body_too_large_is_refused(web):
    assert (
        web.post("/v1/chat/completions", content=b"x" * 1_000_001, headers=HEADERS).status_code
        == 413
    )


def test_a_body_too_large_is_not_read_to_its_end():
    read = []

    async def receive():
        read.append(1)
        return {"type": "http.request", "body": b"x" * 100_000, "more_body": True}

    with pytest.raises(openai_http.HttpError) as caught:
        asyncio.run(openai_http.read_body(Request({"type": "http"}, receive)))
    assert (caught.value.status, len(read)) == (413, 11)


def test_openais_errors_need_neither_django_nor_torch():
    code = (
        "import sys, adapters.inference.openai_http; "
        "sys.exit('torch' in sys.modules or 'django' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_it_tells_how_many_it_is_answering(web):
    assert web.get("/health").json() == {"answering": 0}
