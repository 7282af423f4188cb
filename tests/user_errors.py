"""Checks errors by class, code and field, and by the facts in their message, instead of its
wording.
"""

from contextlib import contextmanager

import pytest

from training.errors import UserError


@contextmanager
def raises_user_error(kind=UserError, *, code=None, field=None, naming=()):
    """The block raises this error, and its message contains every item of `naming`."""
    with pytest.raises(kind) as caught:
        yield caught
    error = caught.value
    assert code is None or error.code == code, error
    assert field is None or error.field == field, error
    assert_mentions(error.message, *naming)


def assert_mentions(text, *facts):
    """The text contains every name and number, in any wording."""
    missing = [fact for fact in facts if str(fact) not in text]
    assert not missing, (missing, text)
