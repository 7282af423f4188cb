"""A full or read-only disk under the web server: every request that writes says so, and leaves
nothing behind.
"""

import errno
import io
import os
import subprocess
import zipfile
from pathlib import Path

import pytest
from django.conf import settings
from django.core.files.uploadedfile import SimpleUploadedFile
from django.db import OperationalError

from adapters.models import AdapterVersion
from tests import tiny
from tests.launching import launch_run
from tests.user_errors import assert_mentions, raises_user_error
from training.child_process import EXIT_DISK
from training.datasets.models import Upload
from training.errors import StorageError
from training.runs.models import Run

pytestmark = pytest.mark.django_db
ROWS = '{"prompt": "a", "completion": "b"}\n{"prompt": "c", "completion": "d"}\n'
URLS = ("/data/new", "/api/v1/datasets/uploads")
TARGETS = [
    "training.datasets.uploads.shutil.move",
    "training.datasets.uploads.write_params",
    "pathlib.Path.mkdir",
]
ERRORS = [
    OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
    OSError(errno.EROFS, os.strerror(errno.EROFS)),
    OperationalError("database or disk is full"),
    OperationalError("could not extend file: No space left on device"),
]


@pytest.fixture
def fail_with(monkeypatch):
    """Makes a function raise this error: `fail_with("module.name", error)`."""

    def patch(target, error):
        def fail(*_args, **_kwargs):
            raise error

        monkeypatch.setattr(target, fail)

    return patch


def list_files():
    """Everything that an upload or import stores. Other tests may leave folders of other ids."""
    folders = (Path(settings.FILE_UPLOAD_TEMP_DIR), Path(settings.HOME) / "uploads")
    return {path for folder in folders if folder.is_dir() for path in folder.iterdir()}


def send_upload(client, url, content, **headers):
    file = SimpleUploadedFile("a.jsonl", ROWS.encode())
    fields = {"file": file} if content == "file" else {"rows": ROWS}
    return client.post(url, {**fields, "name": "x"}, **headers)


@pytest.mark.parametrize(
    ("content", "target"),
    [
        *((content, target) for content in ("file", "rows") for target in TARGETS),
        ("rows", "tempfile.NamedTemporaryFile"),
        ("file", "django.core.files.uploadhandler.TemporaryUploadedFile"),
        ("file", "django.core.files.uploadhandler.TemporaryFileUploadHandler.receive_data_chunk"),
    ],
)
def test_an_upload_to_a_full_disk_says_so_and_leaves_nothing(client, alice, content, target):
    client.force_login(alice)
    client.raise_request_exception = False
    before = list_files()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target, raise_disk_full)
        for url in URLS:
            response = send_upload(client, url, content, HTTP_ACCEPT="application/json")
            assert response.status_code == 507, url
            assert_mentions(response.json()["error"]["message"], "disk is full")
            assert send_upload(client, url, content).status_code == 507
    assert not Upload.objects.exists()
    assert not list_files() - before


def raise_disk_full(*_args, **_kwargs):
    raise ERRORS[0]


@pytest.mark.parametrize("error", ERRORS, ids=str)
def test_each_error_of_the_disk_has_the_same_status_on_pages_and_in_the_api(
    client, alice, fail_with, error
):
    client.force_login(alice)
    client.raise_request_exception = False
    fail_with("training.datasets.uploads.run_detection", error)
    for url in URLS:
        assert send_upload(client, url, "rows").status_code == 507


@pytest.mark.parametrize("target", ["shutil.copyfileobj", "pathlib.Path.mkdir", "tempfile.mkdtemp"])
def test_an_import_of_an_adapter_to_a_full_disk_says_so(client, alice, base_model, target):
    client.force_login(alice)
    client.raise_request_exception = False
    for url in ("/adapters/import", "/api/v1/adapters/import"):
        names = ("adapter_config.json", "adapter_model.safetensors")
        files = [SimpleUploadedFile(name, b"{}") for name in names]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(target, raise_disk_full)
            response = client.post(url, {"base": base_model.pk, "name": "x", "file": files})
        assert response.status_code == 507, url
    assert not AdapterVersion.objects.exists()


def test_a_full_disk_in_the_program_that_unpacks_a_zip_is_a_507(
    client, alice, base_model, monkeypatch
):
    client.force_login(alice)
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            file.writestr(name, "{}")
    upload = SimpleUploadedFile("a.zip", archive.getvalue())
    answer = '{"error": "The disk is full.", "code": "disk_full", "status": 507}\n'
    process = subprocess.CompletedProcess([], EXIT_DISK, answer, "")
    monkeypatch.setattr("adapters.registry.imports.run_child", lambda *_, **__: process)
    form = {"base": base_model.pk, "name": "x", "file": upload}
    assert client.post("/api/v1/adapters/import", form).status_code == 507


def test_another_error_of_the_system_is_still_an_error_of_the_server(client, alice, fail_with):
    client.force_login(alice)
    client.raise_request_exception = False
    fail_with("training.datasets.uploads.run_detection", OSError(errno.EIO, "Input/output error"))
    for url in URLS:
        assert send_upload(client, url, "rows").status_code == 500
    assert not Upload.objects.exists()


@pytest.mark.parametrize("error", ERRORS[:3], ids=str)
def test_a_launch_on_a_full_disk_says_so(
    alice, base_model, data, device, no_queue, preview_here, fail_with, error
):
    first = launch_run(alice, base_model=base_model, data=data, settings=tiny.SETTINGS)
    fail_with("pathlib.Path.write_text", error)
    with raises_user_error(StorageError):
        launch_run(alice, base_model=base_model, data=data, settings=tiny.SETTINGS)
    assert list(Run.objects.all()) == [first]
