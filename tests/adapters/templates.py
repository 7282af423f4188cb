"""Small chat templates for the tests of answers, and what reads answers in their form."""

import json

from adapters.inference.answer_format import AnswerFormat, find_reasoning_tags, parse_answer
from adapters.inference.call_probe import find_call_format
from tests import tiny
from training.engine.data.conversations import render_messages


def make_template(calls, *, before="", content="{{ m.content or '' }}", end="<|im_end|>\n"):
    """A template that writes `calls` after the content of a message `m`."""
    return (
        f"{before}{{% for m in messages %}}<|im_start|>{{{{ m.role }}}}\n{content}{calls}{end}"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


def make_tool(name="set_fan", **properties):
    schema = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": name, "parameters": schema}}


def find_form(template):
    """How a template writes calls."""
    tokenizer = tiny.make_tokenizer(template)

    def render(messages, tools):
        return render_messages(tokenizer, {"messages": messages, "tools": tools})

    return find_call_format(render, find_reasoning_tags(template))


def make_format(template, *tools, **more):
    tags = find_reasoning_tags(template)
    return AnswerFormat(tags, calls=find_form(template), tools=tools or (make_tool(),), **more)


def get_calls(answer):
    return [
        (call["function"]["name"], json.loads(call["function"]["arguments"]))
        for call in answer.calls
    ]


def stream_answer(text, answer_format):
    """Parse an answer as it grows, and check that nothing that was sent changes."""
    sent = parse_answer("", answer_format, is_final=False)
    for end in range(1, len(text) + 1):
        answer = parse_answer(text[:end], answer_format, is_final=False)
        check_kept(sent, answer, text[:end])
        sent = answer
    final = parse_answer(text, answer_format, is_final=True)
    check_kept(sent, final, text)
    return final


def check_kept(sent, answer, text):
    assert answer.reasoning.startswith(sent.reasoning), text
    assert answer.content.startswith(sent.content), text
    assert get_calls(answer)[: len(sent.calls)] == get_calls(sent), text
