"""Writes uploads to disk in chunks and aborts as soon as the size limit is exceeded."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from django.conf import settings
from django.core.files.uploadhandler import StopUpload, TemporaryFileUploadHandler

from training.formatting import format_binary_bytes

STALE_SECONDS = 86_400


class LimitedUploadHandler(TemporaryFileUploadHandler):
    """Django's temporary file, deleted when all files of a request together exceed
    DATASET_MAX_BYTES.
    """

    received_bytes = 0

    def receive_data_chunk(self, raw_data: bytes, start: int) -> None:
        self.received_bytes += len(raw_data)
        if self.received_bytes > settings.DATASET_MAX_BYTES:
            self.file.close()  # a NamedTemporaryFile: closing deletes it
            if self.request is not None:
                self.request.META["snapml.too_large"] = True
            raise StopUpload(connection_reset=False)
        try:
            super().receive_data_chunk(raw_data, start)
        except OSError:  # for example a full disk
            self.file.close()
            raise

    def upload_interrupted(self) -> None:
        if hasattr(self, "file") and not self.file.closed:
            self.file.close()


def was_too_large(request: Any) -> bool:
    return bool(request.META.get("snapml.too_large"))


def format_upload_limit() -> str:
    return format_binary_bytes(settings.DATASET_MAX_BYTES)


def save_pasted_rows(text: str) -> tuple[Path, str, str]:
    """Write pasted rows to a file. Raises OSError: the disk is full; then no file is left."""
    with tempfile.NamedTemporaryFile("wb", dir=settings.FILE_UPLOAD_TEMP_DIR, delete=False) as file:
        try:
            file.write(text.encode("utf-8", errors="replace"))
            file.flush()
        except OSError:
            Path(file.name).unlink()
            raise
    return Path(file.name), "pasted", ""


def remove_stale_uploads() -> None:
    """Delete the files of uploads that a killed web server never finished."""
    for path in Path(settings.FILE_UPLOAD_TEMP_DIR).iterdir():
        if path.is_file() and path.stat().st_mtime < time.time() - STALE_SECONDS:
            path.unlink(missing_ok=True)
