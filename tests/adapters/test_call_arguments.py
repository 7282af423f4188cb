"""The arguments of a call have the types of the tool's schema, and can always be sent."""

import json

import pytest

from adapters.inference.answer_format import parse_answer
from tests.adapters.templates import get_calls, make_format, make_template, make_tool, stream_answer

XML = make_template(
    "{% for c in m.tool_calls or [] %}<function={{ c.function.name }}>\n"
    "{% for key, value in c.function.arguments.items() %}<parameter={{ key }}>\n{{ value }}\n"
    "</parameter>\n{% endfor %}</function>{% endfor %}"
)
JSON = make_template(
    '{% for c in m.tool_calls or [] %}<call>{"name": "{{ c.function.name }}", "arguments": '
    "{{ c.function.arguments | tojson }}}</call>{% endfor %}"
)


@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        ({"type": "string"}, "42", "42"),
        ({"type": ["null", "string"]}, "42", "42"),
        ({"type": ["null", "string"]}, "null", None),
        ({"type": "string"}, "null", "null"),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "007", "007"),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "null", None),
        ({"oneOf": [{"type": "integer"}, {"enum": ["low"]}]}, "3", "3"),
        ({"enum": ["1", "2"]}, "2", "2"),
        ({"enum": [1, 2]}, "2", 2),
        ({"const": "5"}, "5", "5"),
        ({"$ref": "#/$defs/Code"}, "12", "12"),
        ({"$ref": "#/$defs/Loop"}, "12", 12),
        ({"type": "boolean"}, "True", True),
        ({"type": "boolean"}, "false", False),
        ({"type": ["boolean", "null"]}, "False", False),
        ({"type": "integer"}, "8", 8),
        ({"type": "array"}, '["a"]', ["a"]),
        ({}, "True", "True"),
        ({"type": [{"a": 1}], "anyOf": 3, "enum": "x", "$ref": 4}, "8", "8"),
    ],
)
def test_a_parameter_has_the_type_of_its_schema(schema, text, value):
    tool = make_tool(level=schema)
    tool["function"]["parameters"]["$defs"] = {
        "Code": {"type": "string"},
        "Loop": {"anyOf": [{"$ref": "#/$defs/Loop"}]},
    }
    answer = stream_answer(
        f"<function=set_fan>\n<parameter=level>\n{text}\n</parameter>\n</function>",
        make_format(XML, tool),
    )
    assert get_calls(answer) == [("set_fan", {"level": value})]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ('{"note": "one\ntwo\tthree"}', {"note": "one\ntwo\tthree"}),
        ("null", {}),
        ('""', {}),
        ('"{\\"level\\": 2}"', {"level": 2}),
        ('{"note": "\\udc8f"}', {"note": "\ufffd"}),
        ('{"\\udc8f\\u0000": 1}', {"\ufffd\ufffd": 1}),
    ],
)
def test_what_a_model_writes_becomes_arguments_that_can_be_sent(arguments, expected):
    text = f'<call>{{"name": "set_fan", "arguments": {arguments}}}</call>'
    answer = stream_answer(text, make_format(JSON))
    assert get_calls(answer) == [("set_fan", expected)]
    answer.calls[0]["function"]["arguments"].encode()


def test_a_name_and_an_id_can_be_sent():
    text = '<call>{"name": "set\\ud800", "id": "\\udfff", "arguments": {}}</call>'
    call = parse_answer(text, make_format(JSON), is_final=True).calls[0]
    json.dumps(call, ensure_ascii=False).encode()


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999", "1" * 30, "[" * 200 + "]" * 200])
def test_a_call_with_a_number_that_is_no_json_is_text(number):
    text = f'<call>{{"name": "set_fan", "arguments": {{"level": {number}}}}}</call>'
    answer = stream_answer(text, make_format(JSON))
    assert (answer.calls, answer.content) == ([], text)
