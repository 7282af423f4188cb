"""Reasoning and tool calls are read from answers in the form that the chat template writes."""

import pytest

from adapters.inference.answer_format import find_reasoning_tags, parse_answer
from tests import tiny
from tests.adapters.templates import get_calls, make_format, stream_answer
from training.engine.data.conversations import DEFAULT_TEMPLATE, render_messages

QWEN = (
    "{%- if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{%- endif %}"
    "{%- for m in messages %}<|im_start|>{{ m.role }}\n"
    "{%- if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{- m.content }}{%- for c in m.tool_calls or [] %}"
    '\n<tool_call>\n{"name": "{{ c.function.name }}", "arguments": '
    "{{ c.function.arguments | tojson }}}\n</tool_call>{%- endfor %}<|im_end|>\n{%- endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n<think>\n{%- endif %}"
)
MISTRAL = (
    "{% for m in messages %}{% if m.tool_calls %}[TOOL_CALLS] [{% for c in m.tool_calls %}"
    "{% if c.id | length != 9 %}{{ raise_exception('an id has 9 characters') }}{% endif %}"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}, '
    '"id": "{{ c.id }}"}{% if not loop.last %}, {% endif %}{% endfor %}]{{ eos_token }}'
    "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}"
    "{% else %}[INST] {{ m.content }}[/INST]{% endif %}{% endfor %}"
)
MISTRAL_NEW = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}[TOOL_CALLS]{{ c.function.name }}[ARGS]"
    "{{ c.function.arguments | tojson }}{% endfor %}{{ eos_token }}"
    "{% else %}[INST]{{ m.content }}[/INST]{% endif %}{% endfor %}"
)
LLAMA = (
    "{% for m in messages %}<|start|>{{ m.role }}<|end|>\n\n{% if m.tool_calls %}"
    '{"name": "{{ m.tool_calls[0].function.name }}", "parameters": '
    "{{ m.tool_calls[0].function.arguments | tojson }}}{% else %}{{ m.content }}{% endif %}"
    "<|eot|>{% endfor %}{% if add_generation_prompt %}<|start|>assistant<|end|>\n\n{% endif %}"
)
XML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}\n<tool_call>\n<function={{ c.function.name }}>\n"
    "{% for key, value in c.function.arguments.items() %}<parameter={{ key }}>\n{{ value }}\n"
    "</parameter>\n{% endfor %}</function>\n</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
)
TEMPLATES = {
    "qwen": QWEN,
    "mistral": MISTRAL,
    "mistral-new": MISTRAL_NEW,
    "llama": LLAMA,
    "xml": XML,
    "default": DEFAULT_TEMPLATE,
}
TOOLS = tuple(
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {"type": "object", "properties": {"room": {"type": "string"}}},
        },
    }
    for name in ("set_fan", "get_heat")
)
FAN = ("set_fan", {"room": "7", "level": 3})
HEAT = ("get_heat", {"room": "den {x}"})


CALL = '{"name": "set_fan", "arguments": {"room": "7", "level": 3}}'
HEAT_CALL = '{"name": "get_heat", "arguments": {"room": "den {x}"}}'


@pytest.mark.parametrize(
    ("template", "text", "content", "calls"),
    [
        ("qwen", f"<tool_call>\n{CALL}\n</tool_call>", "", [FAN]),
        (
            "qwen",
            f"Both:\n<tool_call>\n{CALL}\n</tool_call>\n<tool_call>\n{HEAT_CALL}\n</tool_call>",
            "Both:",
            [FAN, HEAT],
        ),
        ("qwen", f"<tool_call>{CALL}</tool_call> Done.", " Done.", [FAN]),
        ("qwen", "a < b and <tool", "a < b and <tool", []),
        ("qwen", "<tool_call>\n{broken}\n</tool_call>", "<tool_call>\n{broken}\n</tool_call>", []),
        ("qwen", f"<tool_call>\n{CALL}", "", [FAN]),
        ("mistral", f"[TOOL_CALLS] [{CALL}, {HEAT_CALL}]", "", [FAN, HEAT]),
        ("mistral", f"[TOOL_CALLS]{CALL}", "", [FAN]),
        (
            "mistral-new",
            '[TOOL_CALLS]set_fan[ARGS]{"room": "7", "level": 3}'
            '[TOOL_CALLS]get_heat[ARGS]{"room": "den {x}"}',
            "",
            [FAN, HEAT],
        ),
        ("llama", CALL.replace("arguments", "parameters"), "", [FAN]),
        ("llama", f"{CALL}; {HEAT_CALL}", "", [FAN, HEAT]),
        ("llama", '{"intent": "x", "area": {"a": [1]}}', '{"intent": "x", "area": {"a": [1]}}', []),
        ("llama", "if (x) { return {}; }\n", "if (x) { return {}; }\n", []),
        ("default", f"Yes.{CALL}{HEAT_CALL}", "Yes.", [FAN, HEAT]),
        ("default", f"[{CALL}, {HEAT_CALL}]", "", [FAN, HEAT]),
        ("default", f"Yes [\n{CALL}\n]", "Yes", [FAN]),
        ("default", "a[0] = [1, 2]", "a[0] = [1, 2]", []),
        ("default", '{"name": "Ada", "arguments": {}}', '{"name": "Ada", "arguments": {}}', []),
        (
            "xml",
            "Yes.\n<tool_call>\n<function=set_fan>\n<parameter=room>\n7\n</parameter>\n"
            "<parameter=level>\n3\n</parameter>\n</function>\n</tool_call>",
            "Yes.",
            [FAN],
        ),
    ],
)
def test_tool_calls_are_read_in_the_templates_own_form_in_streams_as_well(
    template, text, content, calls
):
    answer = stream_answer(text, make_format(TEMPLATES[template], *TOOLS))
    assert (answer.content, get_calls(answer)) == (content, calls)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("name", ["", "set_fan"])
def test_a_forced_call_starts_as_the_template_writes_it(template, name):
    answer_format = make_format(TEMPLATES[template], *TOOLS)
    tokenizer = tiny.make_tokenizer(TEMPLATES[template])
    function = {"name": FAN[0], "arguments": FAN[1]}
    call = {"id": "k3x9w2m5p", "type": "function", "function": function}
    messages = [
        {"role": "user", "content": "cool the den"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]
    rendered = render_messages(tokenizer, {"messages": messages, "tools": TOOLS})
    prefix = answer_format.calls.get_prefix(name)
    assert prefix in rendered
    assert prefix.endswith("set_fan") is False
    text = rendered[rendered.rindex(prefix) :].removesuffix("\n")
    for end in ("<|im_end|>", "<|eot|>"):
        text = text.removesuffix(end)
    assert get_calls(stream_answer(text.rstrip(), answer_format)) == [FAN]


def test_ids_are_kept_or_have_nine_letters_and_digits():
    answer_format = make_format(MISTRAL, *TOOLS)
    with_id = '[TOOL_CALLS] [{"name": "get_heat", "arguments": {}, "id": "q1w2e3r4t"}]'
    assert parse_answer(with_id, answer_format, is_final=True).calls[0]["id"] == "q1w2e3r4t"
    without_id = '[TOOL_CALLS] [{"name": "get_heat", "arguments": {}}]'
    call_id = parse_answer(without_id, answer_format, is_final=True).calls[0]["id"]
    assert len(call_id) == 9
    assert call_id.isalnum()


def test_a_template_that_drops_tool_calls_has_no_form():
    assert make_format(tiny.TEMPLATE, *TOOLS).calls is None


@pytest.mark.parametrize(
    ("text", "is_reasoning", "reasoning", "content"),
    [
        ("<think>\nIt is dark.\n</think>\n\nOn.", False, "It is dark.", "On."),
        ("It is dark.\n</think>\n\nOn.", True, "It is dark.", "On."),
        ("<think>\n\n</think>\n\nOn.", False, "", "On."),
        ("<thinner> is a word", False, "", "<thinner> is a word"),
        ("On. <think>late</think>", False, "", "On. <think>late</think>"),
        ("still thinking", True, "still thinking", ""),
    ],
)
def test_thoughts_are_split_at_the_templates_tags(text, is_reasoning, reasoning, content):
    answer = stream_answer(text, make_format(QWEN, *TOOLS, is_reasoning=is_reasoning))
    assert (answer.reasoning, answer.content) == (reasoning, content)


@pytest.mark.parametrize(
    ("template", "tags"),
    [
        ("{{ m.split('</think>') }}", ("<think>", "</think>")),
        ("[THINK]{{ m }}[/THINK]", ("[THINK]", "[/THINK]")),
        ("<seed:think>{{ m }}</seed:think>", ("<seed:think>", "</seed:think>")),
        (
            "<|START_THINKING|>{{ m }}<|END_THINKING|>",
            ("<|START_THINKING|>", "<|END_THINKING|>"),
        ),
        (tiny.TEMPLATE, None),
    ],
)
def test_the_tags_of_thoughts_are_those_of_the_template(template, tags):
    assert find_reasoning_tags(template) == tags


def test_thoughts_before_a_call_are_no_text():
    text = f"<think>\nHot.\n</think>\n\n<tool_call>\n{CALL}\n</tool_call>"
    answer = stream_answer(text, make_format(QWEN, *TOOLS))
    assert (answer.reasoning, answer.content, get_calls(answer)) == ("Hot.", "", [FAN])


def test_a_limit_of_one_call_leaves_out_the_others():
    answer_format = make_format(DEFAULT_TEMPLATE, *TOOLS, max_calls=1)
    assert get_calls(stream_answer(CALL + HEAT_CALL, answer_format)) == [FAN]
