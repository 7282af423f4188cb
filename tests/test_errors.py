"""A full disk is recognized in the errors of the system and of libraries, not in a user's text."""

import errno
import sqlite3

import pytest
from django.db.utils import IntegrityError, OperationalError
from psycopg.errors import DiskFull
from safetensors import SafetensorError

from training.errors import UserError, find_storage_error

FULL, READ_ONLY = "No space left on device", "attempt to write a readonly database"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OSError(errno.ENOSPC, "x"), "disk_full"),
        (OSError("4096 requested and 12 written"), "disk_full"),
        (RuntimeError("PytorchStreamWriter failed writing file data/0"), "disk_full"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "disk_full"),
        (Exception("Read-only file system (os error 30)"), "disk_read_only"),
        (sqlite3.OperationalError("database or disk is full"), "disk_full"),
        (OperationalError(READ_ONLY), "disk_read_only"),
        (DiskFull(f"could not extend file: {FULL}"), "disk_full"),
    ],
)
def test_a_full_or_read_only_disk_is_recognized(error, code):
    storage_error = find_storage_error(error)
    assert storage_error is not None and storage_error.code == code


@pytest.mark.parametrize(
    "error",
    [
        KeyError(FULL),
        ValueError(f"Row 3: {FULL} (os error 28)"),
        TypeError(FULL),
        IndexError(READ_ONLY),
        AssertionError(FULL),
        IntegrityError(f"Key (name)=({FULL}) already exists."),
        UserError(f"User {FULL} not found."),
        OSError(errno.ENOENT, FULL),
    ],
)
def test_the_text_of_a_user_in_an_error_is_no_full_disk(error):
    assert find_storage_error(error) is None
