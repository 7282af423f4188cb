"""The inference program over HTTP: its token, its limits, and OpenAI's shape."""

import json

import pytest
from starlette.testclient import TestClient

from adapters.inference.server import make_app
from adapters.inference.speaker import Busy

BODY = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "snapml": {"base": "/base"}}
HEADERS = {"Authorization": "Bearer secret"}


class Parrot:
    """Says a fixed answer at once, as the speaker would."""

    base = None
    answers = ()
    busy = False

    def ask(self, question):
        if self.busy:
            raise Busy("8 questions are being answered.")
        self.asked = question
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


def test_a_whole_answer(web):
    answer = web.post("/v1/chat/completions", json=BODY, headers=HEADERS).json()
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": "hello"}
    assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}


def test_a_streamed_answer_ends_with_done_and_tells_the_speaker_to_let_go(web, parrot):
    text = web.post("/v1/chat/completions", json={**BODY, "stream": True}, headers=HEADERS).text
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    pieces = [json.loads(line) for line in lines[:-1]]
    assert pieces[0]["snapml"]["status"] == "loading the base model"
    said = [choice["delta"].get("content", "") for piece in pieces for choice in piece["choices"]]
    assert "".join(said) == "hello"
    assert parrot.asked.hung_up.is_set()


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret2"}])
def test_without_its_token_it_answers_nothing(web, headers):
    assert web.post("/v1/chat/completions", json=BODY, headers=headers).status_code == 401


def test_when_it_is_busy_it_says_when_to_come_back(web, parrot):
    parrot.busy = True
    answer = web.post("/v1/chat/completions", json=BODY, headers=HEADERS)
    assert (answer.status_code, answer.headers["Retry-After"]) == (429, "5")


@pytest.mark.parametrize(
    "body", ["{nope", "[]", "{}", json.dumps({**BODY, "messages": [3]}), json.dumps({**BODY, "max_tokens": "x"})]
)
def test_what_it_cannot_read_it_refuses(web, body):
    assert web.post("/v1/chat/completions", content=body, headers=HEADERS).status_code == 400


def test_a_body_too_large_is_refused(web):
    assert web.post("/v1/chat/completions", content=b"x" * 1_000_001, headers=HEADERS).status_code == 413
