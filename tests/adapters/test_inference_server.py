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
from adapters.inference import scheduler as scheduler_module
from adapters.inference.__main__ import start_scheduler
from adapters.inference.batch import Batch
from adapters.inference.request_queue import RequestQueue
from adapters.inference.scheduler import BatchScheduler
from adapters.inference.server import make_app
from adapters.inference.types import QueueFull
from tests import tiny

ROOT = Path(__file__).parents[2]
BODY = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "snapml": {"base": "/base"}}
HEADERS = {"Authorization": "Bearer secret"}


FAN = {
    "type": "function",
    "function": {
        "name": "set_fan",
        "description": "Set a fan's level.",
        "parameters": {"type": "object", "properties": {"level": {"type": "integer"}}},
    },
}


def make_call_message(arguments, **more):
    function = {"name": "set_fan", "arguments": arguments}
    return {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "c1", "type": "function", "function": function, **more}],
    }


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
    with pytest.raises(openai.BadRequestError, match="context length is 256 tokens") as error_info:
        client.chat.completions.create(**{**body, "max_tokens": 4000})
    assert error_info.value.code == "context_length_exceeded"


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
    body = {"model": "m", "prompt": ["a", "b"], "snapml": BODY["snapml"]}
    response = web.post("/v1/completions", json=body, headers=HEADERS)
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
        ({"max_tokens": 7.5}, "max_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"seed": True}, "seed"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"n": 2}, "n"),
        ({"tools": [{}]}, "tools"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": 3}}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [FAN], "tool_choice": "always"}, "tool_choice"),
        (
            {"tools": [FAN], "tool_choice": {"type": "function", "function": {"name": "heat"}}},
            "tool_choice",
        ),
        ({"parallel_tool_calls": "no"}, "parallel_tool_calls"),
        ({"typical_p": 0.4}, "typical_p"),
        ({"structured_outputs": {"regex": "a"}}, "structured_outputs"),
        ({"top_k": 20}, "top_k"),
        ({"reasoning_effort": "low"}, "reasoning_effort"),
        ({"prompt": "hi"}, "prompt"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 4}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": []}]}, "messages"),
        ({"messages": [{"role": "assistant", "content": None}]}, "messages"),
        ({"messages": [{"role": "user", "content": "a", "tool_calls": [{}]}]}, "messages"),
        ({"messages": [{"role": "assistant", "content": "a", "tool_calls": [{}]}]}, "messages"),
        ({"messages": [make_call_message("[1]")]}, "messages"),
        ({"messages": [make_call_message("{nope")]}, "messages"),
        ({"messages": [make_call_message("{}", id=4)]}, "messages"),
        ({"messages": [{"role": "assistant", "content": "a", "audio": {"id": "x"}}]}, "messages"),
        ({"messages": [{"role": "assistant", "content": "", "function_call": {}}]}, "messages"),
    ],
)
def test_an_unsupported_value_is_rejected_with_the_name_of_the_field(web, change, param):
    response = web.post("/v1/chat/completions", json={**BODY, **change}, headers=HEADERS)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


@pytest.mark.parametrize(
    "change",
    [
        {"user": "u7", "metadata": {"a": "b"}, "store": True, "service_tier": "auto"},
        {"safety_identifier": "s", "prompt_cache_key": "k", "parallel_tool_calls": True},
        {"top_k": -1, "repetition_penalty": 1.0, "presence_penalty": 0, "logit_bias": {}},
        {"guided_regex": None, "tools": [], "tool_choice": "auto", "response_format": None},
        {"tools": [FAN], "tool_choice": "none", "stream_options": None},
    ],
)
def test_fields_that_change_no_answer_are_ignored(web, fake_queue, change):
    assert web.post("/v1/chat/completions", json={**BODY, **change}, headers=HEADERS).is_success
    assert fake_queue.requests[0].tools == []


def test_earlier_calls_thoughts_and_ids_are_passed_on(web, fake_queue):
    messages = [
        {"role": "user", "content": "cool it", "name": "ada"},
        {**make_call_message('{"level": 2}'), "reasoning_content": "Hot.", "refusal": None},
        {"role": "tool", "content": [{"type": "text", "text": "ok"}], "tool_call_id": "c1"},
    ]
    body = {**BODY, "messages": messages, "tools": [FAN]}
    assert web.post("/v1/chat/completions", json=body, headers=HEADERS).is_success
    function = {"name": "set_fan", "arguments": {"level": 2}}
    assert fake_queue.requests[0].messages == [
        messages[0],
        {
            "role": "assistant",
            "content": "",
            "reasoning_content": "Hot.",
            "tool_calls": [{"id": "c1", "type": "function", "function": function}],
        },
        {"role": "tool", "content": "ok", "tool_call_id": "c1"},
    ]
    assert fake_queue.requests[0].tools == [FAN]


@pytest.mark.parametrize(
    "function",
    [
        {},
        {"parameters": None, "description": None},
        {"parameters": {}, "description": ""},
        {"parameters": []},
        {"parameters": ""},
    ],
)
def test_a_tool_may_lack_parameters_and_description(web, fake_queue, function):
    tool = {"type": "function", "function": {"name": "get_time", **function}}
    answer = web.post("/v1/chat/completions", json={**BODY, "tools": [tool]}, headers=HEADERS)
    assert answer.status_code == 200
    complete = {"description": "", "parameters": {"type": "object", "properties": {}}}
    assert fake_queue.requests[0].tools[0]["function"] == {"name": "get_time", **complete}


TOOL_TEMPLATE = (
    "{%- if tools %}tools {{ tools | tojson }}\n{%- endif %}{%- for m in messages %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}{%- for c in m.tool_calls or [] %}<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n'
    "</tool_call>{%- endfor %}<|im_end|>\n{%- endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{%- endif %}"
    "{#- reasoning: <think></think> #}"
)


@pytest.fixture
def scripted(serve, tmp_path, monkeypatch):
    """The client of a server whose model answers with the given text, and the requests it got."""
    folder = tiny.make_model(tmp_path / "tools", template=TOOL_TEMPLATE)
    tokenizer = tiny.make_tokenizer(TOOL_TEMPLATE)
    request_queue = RequestQueue()
    requests = []
    submit_request = request_queue.submit_request
    request_queue.submit_request = lambda request: (
        requests.append(request),
        submit_request(request),
    )
    start_scheduler(request_queue)
    client = serve(request_queue)

    def ask(answer, messages=BODY["messages"], **more):
        ids = iter([*tokenizer(answer, add_special_tokens=False)["input_ids"], 1])
        monkeypatch.setattr(scheduler_module, "pick_token", lambda *_args, **_more: next(ids))
        location = {"extra_body": {"snapml": {"base": str(folder)}}}
        return client.chat.completions.create(model="t", messages=messages, **location, **more)

    return ask, requests


CALL = '<tool_call>\n{"name": "set_fan", "arguments": {"level": 3}}\n</tool_call>'


def test_an_answers_thoughts_and_calls_are_fields_of_the_message(scripted):
    ask, _requests = scripted
    answer = ask(f"<think>\nHot.\n</think>\n\nI do.{CALL}", tools=[FAN])
    choice = answer.choices[0]
    assert (choice.message.content, choice.message.reasoning_content) == ("I do.", "Hot.")
    assert choice.finish_reason == "tool_calls"
    assert choice.message.tool_calls[0].function.name == "set_fan"
    assert json.loads(choice.message.tool_calls[0].function.arguments) == {"level": 3}
    assert ask(CALL, tools=[FAN]).choices[0].message.content is None


def test_a_stream_has_the_same_fields(scripted):
    ask, _requests = scripted
    tool = {"type": "function", "function": {"name": "set_fan"}}  # short, for the small context
    answer = f"<think>Hot.</think>I do.{CALL}{CALL}"
    chunks = list(ask(answer, tools=[tool], stream=True))
    choices = [choice for chunk in chunks for choice in chunk.choices]
    assert "".join(choice.delta.content or "" for choice in choices) == "I do."
    reasoning = (getattr(choice.delta, "reasoning_content", None) or "" for choice in choices)
    assert "".join(reasoning) == "Hot."
    calls = [call for choice in choices for call in choice.delta.tool_calls or ()]
    assert [call.index for call in calls] == [0, 1]
    assert json.loads(calls[1].function.arguments) == {"level": 3}
    assert choices[-1].finish_reason == "tool_calls"


@pytest.mark.parametrize("stream", [False, True])
def test_half_a_surrogate_pair_in_a_call_is_replaced(scripted, stream):
    ask, _requests = scripted
    answer = ask(CALL.replace("3", '"\\ud83d"'), tools=[FAN], stream=stream)
    if stream:
        deltas = [choice.delta for chunk in answer for choice in chunk.choices]
        calls = [call for delta in deltas for call in delta.tool_calls or ()]
    else:
        calls = answer.choices[0].message.tool_calls
    assert json.loads(calls[0].function.arguments) == {"level": "\ufffd"}


def test_without_tools_a_call_is_text(scripted):
    ask, _requests = scripted
    choice = ask(CALL).choices[0]
    assert (choice.message.content, choice.finish_reason) == (CALL, "stop")


def test_a_forced_call_is_continued_by_the_model(scripted):
    ask, requests = scripted
    choice = {"type": "function", "function": {"name": "set_fan"}}
    answer = ask(' {"level": 1}}\n</tool_call>', tools=[FAN], tool_choice=choice)
    assert json.loads(answer.choices[0].message.tool_calls[0].function.arguments) == {"level": 1}
    answer = ask('set_fan", "arguments": {}}', tools=[FAN], tool_choice="required")
    assert answer.choices[0].message.tool_calls[0].function.name == "set_fan"
    assert requests[0].answer_format.prefix == '<tool_call>\n{"name": "set_fan", "arguments":'


def test_earlier_calls_and_tools_are_in_the_prompt(scripted):
    ask, requests = scripted
    messages = [
        *BODY["messages"],
        make_call_message('{"level": 2}'),
        {"role": "tool", "content": "ok", "tool_call_id": "c1"},
    ]
    ask("Done.", messages=messages, tools=[FAN])
    prompt = tiny.make_tokenizer(TOOL_TEMPLATE).decode(requests[0].prompt_ids)
    assert "Set a fan's level." in prompt
    assert '{"name": "set_fan", "arguments": {"level": 2}}' in prompt


def test_a_template_without_tools_is_named(serve, tiny_model):
    request_queue = RequestQueue()
    start_scheduler(request_queue)
    client = serve(request_queue)
    location = {"extra_body": {"snapml": {"base": str(tiny_model)}}}
    for more, param in (
        ({"messages": BODY["messages"], "tools": [FAN]}, "tools"),
        ({"messages": [*BODY["messages"], make_call_message("{}")]}, "messages"),
        (
            {"messages": [{"role": "user", "content": "set_fan?"}, make_call_message("{}")]},
            "messages",
        ),
    ):
        with pytest.raises(openai.BadRequestError) as error_info:
            client.chat.completions.create(model="m", **more, **location)
        assert error_info.value.code == "template_without_tools"
        assert error_info.value.param == param


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/v1/responses", 404),
        ("GET", "/v1/files/abc", 404),
        ("GET", "/v1/chat/completions", 405),
    ],
)
def test_an_unknown_url_is_an_error_in_openais_format(web, method, path, status):
    response = web.request(method, path, headers=HEADERS)
    assert response.status_code == status
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


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
