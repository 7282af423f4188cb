"""Errors that people read, told apart by their class, code and field instead of their sentence."""

from contextlib import contextmanager

import pytest

from training.errors import UserError


@contextmanager
def raises_user_error(kind=UserError, *, code=None, field=None, naming=()):
    """The block raises this error, and its message has every name and number of `naming`."""
    with pytest.raises(kind) as caught:
        yield caught
    error = caught.value
    assert code is None or error.code == code, error
    assert field is None or error.field == field, error
    assert_mentions(error.message, *naming)


def assert_mentions(text, *facts):
    """Names and numbers that a sentence has to have, however it is worded."""
    missing = [fact for fact in facts if str(fact) not in text]
    assert not missing, (missing, text)
