"""What can be wrong with a file and with a row."""

from __future__ import annotations

from training.errors import UserError, to_one_line


class BadFile(UserError):
    """The file cannot be read as data."""


class BadRow(UserError):
    """A faulty row. The message names the field and the problem; the caller adds the location.

    `group` is the message without row-specific values, so that equal problems are reported once.
    `is_fatal`: the rows after this one were not read either.
    """

    def __init__(
        self, message: str, *, group: str = "", is_fatal: bool = False, code: str = ""
    ) -> None:
        super().__init__(clean_text(message)[:300], code=code)  # column names are untrusted
        self.group = clean_text(group or message)[:160]
        self.is_fatal = is_fatal


def clean_text(text: str) -> str:
    """Text that can be stored and displayed: without control characters and lone surrogates."""
    return to_one_line(text.encode("utf-8", errors="replace").decode())
