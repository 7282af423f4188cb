"""Errors with a message for users. Pages, the API and workers turn a `UserError` into a page, a
JSON response or the message of a run. Does not import Django.

Every message says what is wrong, where, and what to do. Errors of libraries are recognized here:
full disks, and panics of libraries in Rust.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

# Errors that describe the system. The text of others, as of a KeyError, may be a user's. They are
# compared by name, since Django and safetensors are not imported here; PostgreSQL's and SQLite's
# are OperationalErrors.
SYSTEM_ERRORS = frozenset({"OSError", "RuntimeError", "SafetensorError", "OperationalError"})
# How the libraries in Rust (safetensors, tokenizers) write errno in their messages
RUST_ERRNO = re.compile(r"\(os error (\d+)\)")
# Libraries that report a failed write without errno: SQLite, PostgreSQL, NumPy and torch
TEXT_ERRNOS = {
    errno.ENOSPC: re.compile(
        r"No space left on device|database or disk is full|\d+ requested and \d+ written"
        r"|PytorchStreamWriter failed writing"
    ),
    errno.EDQUOT: re.compile(r"Disk quota exceeded"),
    errno.EROFS: re.compile(r"Read-only file system|attempt to write a readonly database"),
}


class UserError(Exception):
    """An error that a person can fix. `status` is the HTTP status code, `field` the form field if
    there is one, and `code` identifies the reason when several errors share a class and a field.
    """

    status = 400

    def __init__(self, message: str, *, field: str = "", code: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.code = code


class ConfigError(UserError):
    """A setting is invalid, or two settings contradict each other."""


class NotAllowed(UserError):
    """The user is signed in but has no permission for this action."""

    status = 403


class NotFound(UserError):
    """The object does not exist, or the user may not see it. Both cases give the same message on
    purpose.
    """

    status = 404


class Conflict(UserError):
    """The object exists, but its current state does not allow the action."""

    status = 409


class TooLarge(UserError):
    """More bytes, rows or characters than the limit in the message."""

    status = 413


class StorageError(UserError):
    """A disk is full or over quota, or its file system is read-only. A retry does not help until
    somebody frees space or makes the file system writable.
    """

    status = 507
    codes = ("disk_full", "disk_read_only")


class LibraryPanic(UserError):
    """A library in Rust stopped, for example the tokenizer of a damaged model."""


def get_errno(error: BaseException) -> int | None:
    """The system's error number of an OSError, or of a library's error that names the cause in its
    message.
    """
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    if not is_system_error(error):
        return None
    text = str(error)
    match = RUST_ERRNO.search(text)
    if match:
        return int(match[1])
    return next((number for number, pattern in TEXT_ERRNOS.items() if pattern.search(text)), None)


def is_system_error(error: BaseException) -> bool:
    """Whether a library may have written the system's error into the message. The tokenizers raise
    plain Exceptions.
    """
    names = {base.__name__ for base in type(error).__mro__}
    return type(error) is Exception or not SYSTEM_ERRORS.isdisjoint(names)


def find_storage_error(error: BaseException, *, then: str = "try again") -> StorageError | None:
    """The error for users if this is one of a full or read-only disk, else None. `then` is what to
    do when the disk is writable again.
    """
    number = get_errno(error)
    if number in (errno.ENOSPC, errno.EDQUOT):
        return StorageError(f"The disk is full. Free some space, then {then}.", code="disk_full")
    if number == errno.EROFS:
        return StorageError(
            f"The file system is read-only. Make it writable, then {then}.", code="disk_read_only"
        )
    return None


@contextmanager
def convert_panics() -> Iterator[None]:
    """Turn a panic of a library in Rust into an error that `except Exception` catches. PyO3's own
    is not an Exception, so it would end the thread that reports the errors of all others.

    Raises:
        LibraryPanic: the code inside panicked.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise LibraryPanic(
            f"The model's tokenizer or weights cannot be used: {str(error)[:200]}. Its files are "
            "probably damaged; use another copy of the model.",
            field="model",
            code="library_panic",
        ) from error


def check_name_typed(typed: str, name: str) -> None:
    """Check that the user typed the object's name before it is deleted for good.

    Raises:
        UserError: a different name was typed.
    """
    if to_one_line(typed) != name:
        raise UserError(f"Type the name {name} to delete it.", field="name")


def to_one_line(text: str) -> str:
    """A name that is safe to store and display: control characters (NUL, line breaks, escapes)
    become spaces.
    """
    return "".join(c if c.isprintable() else " " for c in text).strip()
