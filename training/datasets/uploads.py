"""Uploads go to disk piece by piece and break off at the limit, not after it."""

from __future__ import annotations

from typing import Any

from django.conf import settings
from django.core.files.uploadhandler import StopUpload, TemporaryFileUploadHandler


class LimitedUploadHandler(TemporaryFileUploadHandler):
    """Django's temporary file, removed at once when it grows past DATASET_MAX_BYTES."""

    seen = 0

    def receive_data_chunk(self, raw_data: bytes, start: int) -> None:
        self.seen += len(raw_data)
        if self.seen > settings.DATASET_MAX_BYTES:
            self.file.close()  # a NamedTemporaryFile: closing removes it
            if self.request is not None:
                self.request.META["snapml.too_large"] = True
            raise StopUpload(connection_reset=False)
        super().receive_data_chunk(raw_data, start)

    def upload_interrupted(self) -> None:
        if hasattr(self, "file") and not self.file.closed:
            self.file.close()


def was_too_large(request: Any) -> bool:
    return bool(request.META.get("snapml.too_large"))


def limit_words() -> str:
    return f"{settings.DATASET_MAX_BYTES // 2**20} MiB"
