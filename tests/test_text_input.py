"""The gate for text and numbers: what it refuses, and which field it names."""

import tracemalloc

import pytest

from tests.user_errors import raises_user_error
from training.text_input import MAX_VALUES, InvalidInput, check_text, clean_value, parse_json


@pytest.mark.parametrize(
    ("text", "code", "field"),
    [
        ('{"run": {"notes": ["fine", "\\udc41"]}}', "unstorable_text", "run.notes.1"),
        ('{"tags": "x\\u0000"}', "unstorable_text", "tags"),
        ('{"note": {"\\ud801": 1}}', "unstorable_text", "note"),
        ('{"locked": {"alpha": -Infinity}}', "number_out_of_range", "locked.alpha"),
        ('{"share": 2e308}', "number_out_of_range", "share"),
        ('{"seed": -9223372036854775809}', "number_out_of_range", "seed"),
        ('{"seed": ' + "7" * 6000 + "}", "number_out_of_range", "seed"),
        ('{"x": ' + "[" * 120 + "]" * 120 + "}", "nested_too_deeply", "x"),
        ("{" + '"k":{' * 50_000, "nested_too_deeply", ""),
        ('{"x": 1,}', "invalid_json", ""),
        (b'{"x": "\xff"}', "invalid_json", ""),
    ],
)
def test_a_value_that_cannot_be_stored_is_refused_with_its_field(text, code, field):
    with raises_user_error(InvalidInput, code=code, field=field):
        parse_json(text, "The request")


def test_every_unicode_text_and_every_number_of_a_database_passes():
    text = '{"a": ["\\ud83d\\ude00", "\\uffff\\u202e", 9223372036854775807, 1e308, true, null]}'
    assert parse_json(text, "x")["a"] == [
        "\U0001f600",
        "\uffff\u202e",
        2**63 - 1,
        1e308,
        True,
        None,
    ]


def test_the_files_of_a_model_may_have_any_number():
    text = '{"model_max_length": 1000000000000000019884624838656, "time_step_limit": [0, Infinity]}'
    assert parse_json(text, "config.json", allow_any_number=True)["model_max_length"] == int(1e30)
    with raises_user_error(InvalidInput, code="unstorable_text"):
        parse_json('{"x": "\\u0000"}', "config.json", allow_any_number=True)


def test_the_output_of_a_model_is_cleaned_instead():
    cleaned = clean_value({"a\0": ["\ud800x", 1.5, None]})
    assert cleaned == {"a\ufffd": ["\ufffdx", 1.5, None]}
    check_text(str(cleaned), "x")


def test_a_body_of_many_values_below_a_long_path_takes_little_memory():
    depth = 98
    body = ('{"' + "k" * 40 + '":') * depth + "[" + "0," * 100_000 + "0]" + "}" * depth
    tracemalloc.start()
    try:
        parse_json(body, "The request")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 20 * len(body)


def test_a_value_with_too_many_values_is_refused():
    with raises_user_error(InvalidInput, code="too_large"):
        parse_json("[" + "0," * MAX_VALUES + "0]", "The request")
