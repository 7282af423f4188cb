"""What a chat template rejects or drops of a request is refused with the field that it is in."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from adapters.inference.scheduler import build_error_event
from adapters.inference.text import encode_request
from adapters.inference.types import BaseRef, GenerationRequest
from tests import tiny
from tests.adapters.templates import find_form, make_template, make_tool
from tests.user_errors import raises_user_error
from training.engine.data.errors import DataError

ALL_CALLS = "m.tool_calls or []"
CALLS = (
    f"{{% for c in {ALL_CALLS} %}}"
    '<call>{"name": "{{ c.function.name }}", "arguments": '
    "{{ c.function.arguments | tojson }}}</call>{% endfor %}"
)
TOOLS = "{{ tools | tojson }}\n"
TOOL = make_tool("find", word={"type": "string"})
MESSAGES = [
    {"role": "user", "content": "find a lamp, find it"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"id": str(n), "type": "function", "function": {"name": "find", "arguments": {"n": n}}}
            for n in (1, 2)
        ],
    },
    {"role": "tool", "content": "find", "tool_call_id": "1"},
]


def encode(template):
    loaded_model = SimpleNamespace(
        tokenizer=tiny.make_tokenizer(template),
        reasoning_tags=None,
        call_format=find_form(make_template(CALLS)),
    )
    request = GenerationRequest(
        base=BaseRef(Path("/base")), adapter=None, messages=MESSAGES, tools=[TOOL]
    )
    return encode_request(loaded_model, request)


def test_a_request_that_is_rendered_completely_is_accepted():
    assert encode(make_template(CALLS, before=TOOLS))


@pytest.mark.parametrize(
    ("template", "code", "field"),
    [
        (make_template("", before=TOOLS), "template_without_tools", "messages"),
        (
            make_template(CALLS.replace(ALL_CALLS, f"({ALL_CALLS})[:1]"), before=TOOLS),
            "template_without_tools",
            "messages",
        ),
        (
            make_template(CALLS.replace("c.function.arguments", "{}"), before=TOOLS),
            "template_without_tools",
            "messages",
        ),
        (make_template(CALLS), "template_without_tools", "tools"),
        (
            make_template(
                CALLS, before=TOOLS, content="{% if m.role != 'tool' %}{{ m.content }}{% endif %}"
            ),
            "template_drops_message",
            "messages",
        ),
        (
            make_template(CALLS, before="{{ raise_exception('no tools, please') }}"),
            "template_error",
            "messages",
        ),
    ],
    ids=["calls", "second call", "arguments", "tools", "result", "rejected"],
)
def test_what_a_template_drops_is_refused(template, code, field):
    with raises_user_error(DataError, code=code, field=field) as caught:
        encode(template)
    event = build_error_event(caught.value)
    assert (event["fault"], event["param"], event["code"]) == ("client", field, code)
