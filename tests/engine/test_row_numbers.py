"""Row numbers in settings: `3, 17-20`."""

import pytest

from training.engine.config import RunConfig
from training.engine.row_numbers import MAX_CHARACTERS, format_row_numbers, list_row_numbers
from training.errors import ConfigError


@pytest.mark.parametrize(
    ("numbers", "text"),
    [([], ""), ([3], "3"), ([3, 17, 18, 19, 20, 22], "3, 17-20, 22"), ([1, 2], "1-2")],
)
def test_row_numbers_are_written_as_ranges_and_read_back(numbers, text):
    assert format_row_numbers(numbers) == text
    assert list_row_numbers(text, 1000) == numbers


def test_rows_that_the_data_does_not_have_are_ignored():
    assert list_row_numbers("2-999999999", 4) == [2, 3, 4]


def test_a_list_that_no_setting_takes_is_empty():
    assert format_row_numbers(range(1, 100_000, 2)) == ""


@pytest.mark.parametrize(
    "text", ["0", "x", "3,", "3-1", "5, 3", "1-4, 4", "1e3", "٣", "1" * 30, "-2", "1--2"]
)
def test_other_texts_are_rejected(text):
    with pytest.raises(ConfigError) as refused:
        RunConfig(excluded_rows=text)
    assert refused.value.field == "excluded_rows"


def test_a_longer_text_is_rejected():
    text = ", ".join(str(number) for number in range(1, MAX_CHARACTERS, 2))
    with pytest.raises(ConfigError):
        RunConfig(excluded_eval_rows=text)
