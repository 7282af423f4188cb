"""Durable and atomic file operations. Does not import torch."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import threading
from contextlib import suppress
from pathlib import Path

from training.errors import find_storage_error

FOLDER_VANISHED = "The run's folder has vanished. Restore it, or start the run again."


def describe_storage_error(error: BaseException, folder: Path) -> str | None:
    """What is wrong with the storage of a run's folder and what to do; None if it is another error.
    No retry helps before somebody acts.
    """
    if not folder.is_dir():
        return FOLDER_VANISHED
    storage_error = find_storage_error(error, then="continue the run")
    return storage_error.message if storage_error else None


def fsync_path(path: Path) -> None:
    """Flush a file's content, or a folder's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, text: str) -> None:
    """Write a file by renaming a temporary one, so a reader sees the old or the new content and
    never a part.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        temporary.write_text(text)
        fsync_path(temporary)
        temporary.rename(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    fsync_path(path.parent)


def measure_tree(folder: Path) -> int:
    """Bytes of the files of a folder, which another process may be changing. Symbolic links, and
    files that vanish meanwhile, count as zero.
    """
    total = 0
    for parent, _, names in os.walk(folder):  # skips a subfolder that vanishes during the walk
        for name in names:
            with suppress(OSError):
                status = Path(parent, name).lstat()
                total += status.st_size if stat.S_ISREG(status.st_mode) else 0
    return total


def remove_tree(folder: Path) -> int:
    """Remove a folder and return the bytes that its files had."""
    freed_bytes = measure_tree(folder)
    shutil.rmtree(folder, ignore_errors=True)
    return freed_bytes


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
