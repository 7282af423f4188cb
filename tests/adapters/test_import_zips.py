"""A zip that is damaged, or whose adapter is not the one that would be read, is refused."""

import io
import json
import pickle
import resource
import struct
import zipfile

import pytest
from django.core.files.uploadedfile import SimpleUploadedFile

from adapters.registry.imports import import_version
from tests.adapters.importing import CONFIG, WEIGHTS, assert_rejected, make_upload, read_folder
from tests.user_errors import raises_user_error

pytestmark = [pytest.mark.django_db, pytest.mark.once]
DIRECTORY, END = b"PK\x01\x02", b"PK\x05\x06"


@pytest.fixture
def files(peft_folder):
    return read_folder(peft_folder(target_modules=["k_proj"])[0])


def pack(files, compression):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return bytearray(buffer.getvalue())


def flip_bytes(data):
    """Damage the first file's content: its header has 30 bytes and its name."""
    start = 30 + len(WEIGHTS) + 40
    data[start : start + 30] = bytes(byte ^ 0xFF for byte in data[start : start + 30])


def require_version(data):
    data[data.find(DIRECTORY) + 6] = 98


def set_unknown_compression(data):
    data[data.find(DIRECTORY) + 10] = 95


def set_password_flag(data):
    data[data.find(DIRECTORY) + 8] |= 1


def move_directory(data):
    position = data.rfind(END) + 16
    data[position : position + 4] = struct.pack("<I", 0x00F0F0F0)


@pytest.mark.parametrize(
    ("compression", "damage", "code"),
    [
        (zipfile.ZIP_DEFLATED, flip_bytes, "broken_zip"),
        (zipfile.ZIP_LZMA, flip_bytes, "broken_zip"),
        (zipfile.ZIP_BZIP2, flip_bytes, "broken_zip"),
        (zipfile.ZIP_STORED, flip_bytes, "broken_zip"),
        (zipfile.ZIP_DEFLATED, set_unknown_compression, "broken_zip"),
        (zipfile.ZIP_DEFLATED, set_password_flag, "broken_zip"),
        (zipfile.ZIP_DEFLATED, require_version, "not_a_zip"),
        (zipfile.ZIP_DEFLATED, move_directory, "broken_zip"),
    ],
)
def test_a_damaged_zip_is_refused(alice, base_model, files, compression, damage, code):
    data = pack(files, compression)
    damage(data)
    uploads = [SimpleUploadedFile("adapter.zip", bytes(data))]
    assert_rejected(alice, base_model, uploads, code)


def test_the_page_shows_that_a_zip_is_damaged(as_alice, base_model, files):
    data = pack(files, zipfile.ZIP_DEFLATED)
    flip_bytes(data)
    upload = SimpleUploadedFile("adapter.zip", bytes(data))
    body = {"name": "Broken", "base": base_model.pk, "file": upload}
    assert as_alice.post("/adapters/import", body).status_code == 400


@pytest.mark.parametrize("folder", ["", "out/"])
@pytest.mark.parametrize(
    ("outer", "code"),
    [
        ({CONFIG: b"{}", "adapter_model.bin": pickle.dumps(1)}, "pickled_weights"),
        ({"adapter_model.bin": pickle.dumps(1)}, "pickled_weights"),
        ({CONFIG: b"{}"}, "missing_file"),
    ],
)
def test_a_checkpoint_is_not_taken_for_the_adapter_around_it(
    alice, base_model, files, folder, outer, code
):
    content = {folder + name: data for name, data in outer.items()}
    content |= {f"{folder}checkpoint-7/{name}": data for name, data in files.items()}
    assert_rejected(alice, base_model, make_upload(content), code, "checkpoint-7")


@pytest.mark.own_process
@pytest.mark.parametrize("size", [20, 60])
def test_a_huge_header_is_refused_outside_of_the_web_process(alice, base_model, size):
    header = json.dumps({f"tensor.{n}": "x" * 1000 for n in range(size * 1000)}).encode()
    weights = len(header).to_bytes(8, "little") + header
    uploads = [
        SimpleUploadedFile("adapter_config.json", b'{"peft_type": "LORA"}'),
        SimpleUploadedFile("adapter_model.safetensors", weights),
    ]
    del header, weights
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with raises_user_error(field="file"):
        import_version(alice, uploads, base_model, "Lights")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 40_000  # kB


@pytest.mark.own_process
def test_the_program_reports_what_is_wrong_with_its_status(alice, base_model):
    uploads = [
        SimpleUploadedFile("adapter_config.json", b" " * 300_000),
        SimpleUploadedFile("adapter_model.safetensors", b"x"),
    ]
    with raises_user_error(code="too_large") as caught:
        import_version(alice, uploads, base_model, "Lights")
    assert caught.value.status == 413
