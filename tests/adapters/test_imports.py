"""Importing adapters trained elsewhere: valid files are registered, and everything else is rejected
without being unpacked, executed or stored.
"""

import io
import json
import pickle
import stat
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from django.conf import settings
from django.core.files.uploadedfile import SimpleUploadedFile

from adapters.models import AdapterVersion
from adapters.registry import imports
from tests.engine.wrapped_models import CPU
from tests.registry import train_version
from tests.user_errors import raises_user_error
from training.engine.modeling.model import load_base
from training.engine.modeling.weights import load_adapter

pytestmark = pytest.mark.django_db
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture
def adapter_files(alice, base_model, data, device, no_queue, engine_once):
    """The files of a trained adapter, in memory."""
    version = train_version(alice, base_model, data, engine_once, max_steps=2)
    files = {name: (version.folder / name).read_bytes() for name in (WEIGHTS, CONFIG)}
    version.delete()
    return files


def make_upload(files, prefix=""):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name if isinstance(name, zipfile.ZipInfo) else prefix + name, content)
    return [SimpleUploadedFile("adapter.zip", buffer.getvalue())]


def replace_config(files, **changes):
    return {**files, CONFIG: json.dumps({**json.loads(files[CONFIG]), **changes}).encode()}


@pytest.mark.parametrize("prefix", ["", "my-adapter/"])
def test_a_folder_that_peft_saved_is_imported_without_its_paths(
    alice, base_model, adapter_files, prefix
):
    files = replace_config(adapter_files, base_model_name_or_path="/home/somebody/secret")
    version = imports.import_version(
        alice, make_upload(files, prefix), base_model, "From elsewhere"
    )
    assert (str(version), version.method, version.provenance["imported"]) == (
        "From elsewhere v1",
        "lora",
        True,
    )
    assert version.trainable_parameters > 0
    config = json.loads((version.folder / CONFIG).read_text())
    assert config["base_model_name_or_path"] == base_model.name
    assert "megatron_core" not in config
    assert len(config["target_modules"]) == 14
    assert load_adapter(
        load_base(base_model.folder, torch.float32, CPU), version.folder, "default"
    ).peft_config


def make_header(entries, body=b""):
    text = json.dumps(entries).encode() if not isinstance(entries, bytes) else entries
    return struct.pack("<Q", len(text)) + text + body


ONE_TENSOR = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}


@pytest.mark.parametrize(
    ("weights", "code", "facts"),
    [
        (b"", "broken_header", ()),
        (struct.pack("<Q", 2**60) + b"{}", "broken_header", ("1,152,921,504,606,846,976",)),
        (pickle.dumps({"a": 1}), "broken_header", ()),
        (make_header(b"{nope"), "broken_header", ()),
        (
            make_header(
                b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "a": 1}', b"x" * 8
            ),
            "broken_header",
            (),
        ),
        (
            make_header({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, b"x" * 8),
            "wrong_size",
            ("'a'",),
        ),
        (
            make_header(
                {**ONE_TENSOR, "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}},
                b"x" * 12,
            ),
            "bad_offsets",
            (),
        ),
        (make_header(ONE_TENSOR, b"x" * 4), "bad_offsets", ()),
        (make_header(ONE_TENSOR, b"x" * 80), "bad_offsets", ()),
        (
            make_header({"a": {"dtype": "O", "shape": [2], "data_offsets": [0, 8]}}, b"x" * 8),
            "broken_entry",
            ("'a'",),
        ),
        (
            make_header(
                {"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 8]}}, b"x" * 8
            ),
            "wrong_size",
            ("'a'",),
        ),
        (
            make_header({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}, b"x" * 8),
            "wrong_size",
            ("'a'",),
        ),
        (make_header({"__metadata__": {}}), "bad_offsets", ()),
        (
            make_header({"a": {"dtype": "F4", "shape": [16], "data_offsets": [0, 8]}}, b"x" * 8),
            "unsupported_dtype",
            ("F4",),
        ),
    ],
)
def test_invalid_weights_are_rejected_before_any_library_reads_them(
    alice, base_model, adapter_files, weights, code, facts
):
    uploads = make_upload({**adapter_files, WEIGHTS: weights})
    assert_rejected(alice, base_model, uploads, code, *facts)


@pytest.mark.parametrize(
    ("changes", "code", "facts"),
    [
        (
            {"auto_mapping": {"parent_library": "os", "base_model_class": "system"}},
            "unsupported_setting",
            ("auto_mapping",),
        ),
        ({"megatron_core": "os"}, "unsupported_setting", ("megatron_core",)),
        ({"modules_to_save": ["lm_head"]}, "unsupported_setting", ("modules_to_save",)),
        ({"layer_replication": [[0, 2]]}, "unsupported_setting", ("layer_replication",)),
        ({"bias": "all"}, "unsupported_setting", ("bias",)),
        ({"r": 10**9}, "invalid_size", ("r", "4,096")),
        ({"r": 3}, "wrong_shape", ("rank 3",)),
        ({"rank_pattern": {"(a+)+$": 4}}, "invalid_pattern", ("rank_pattern",)),
        ({"peft_type": "XLORA"}, "unknown_type", ("XLORA",)),
        ({"peft_type": {"a": 1}}, "unknown_type", ()),
    ],
)
def test_a_config_that_names_code_or_an_unknown_type_is_rejected(
    alice, base_model, adapter_files, changes, code, facts
):
    uploads = make_upload(replace_config(adapter_files, **changes))
    assert_rejected(alice, base_model, uploads, code, *facts)


def test_a_tensor_that_would_overwrite_the_base_is_rejected(alice, base_model, adapter_files):
    from safetensors.torch import load, save

    tensors = load(adapter_files[WEIGHTS])
    tensors["base_model.model.lm_head.weight"] = torch.zeros(4, 4)
    assert_rejected(
        alice,
        base_model,
        make_upload({**adapter_files, WEIGHTS: save(tensors)}),
        "unknown_tensor",
        "lm_head.weight",
    )
    del tensors["base_model.model.lm_head.weight"]
    tensors.pop(next(name for name in tensors if "lora_B" in name))
    assert_rejected(
        alice,
        base_model,
        make_upload({**adapter_files, WEIGHTS: save(tensors)}),
        "unpaired_matrix",
    )


@pytest.mark.parametrize("method", ["ia3", "prefix", "prompt", "bottleneck"])
def test_adapters_of_every_method_can_be_imported(
    alice, base_model, data, device, no_queue, engine_once, method
):
    version = train_version(alice, base_model, data, engine_once, method=method, max_steps=1)
    files = {name: (version.folder / name).read_bytes() for name in (WEIGHTS, CONFIG)}
    imported = imports.import_version(alice, make_upload(files), base_model, "Again")
    assert imported.method == method
    assert load_adapter(
        load_base(base_model.folder, torch.float32, CPU), imported.folder, "default"
    ).peft_config


def make_link(name, target):
    entry = zipfile.ZipInfo(name)
    entry.external_attr = (stat.S_IFLNK | 0o777) << 16
    return {entry: target}


@pytest.mark.parametrize(
    ("change", "code", "facts"),
    [
        (lambda files: {CONFIG: files[CONFIG]}, "missing_file", (WEIGHTS,)),
        (
            lambda files: {CONFIG: files[CONFIG], "adapter_model.bin": pickle.dumps(1)},
            "pickled_weights",
            (".bin",),
        ),
        (lambda files: {**files, f"b/{WEIGHTS}": b"x"}, "duplicate_file", (WEIGHTS,)),
        (
            lambda files: {CONFIG: files[CONFIG], f"a/b/{WEIGHTS}": files[WEIGHTS]},
            "missing_file",
            (WEIGHTS,),
        ),
        (
            lambda files: {CONFIG: files[CONFIG], **make_link(WEIGHTS, "/etc/passwd")},
            "not_a_file",
            (WEIGHTS,),
        ),
        (lambda files: {**files, WEIGHTS: b"\0" * 5_000_000}, "too_large", ("5.0 MB",)),
        (lambda files: {**files, CONFIG: b"[" * 100_000}, "too_large", (CONFIG,)),
        (lambda files: {**files, CONFIG: b"[]"}, "invalid_json", (CONFIG,)),
        (lambda files: {**files, **{f"f{n}": b"" for n in range(300)}}, "too_many_entries", (200,)),
    ],
)
def test_a_malformed_zip_is_rejected(alice, base_model, adapter_files, change, code, facts):
    assert_rejected(alice, base_model, make_upload(change(adapter_files)), code, *facts)


def test_paths_that_escape_the_zip_are_never_written(alice, base_model, adapter_files, tmp_path):
    version = imports.import_version(
        alice,
        make_upload({**adapter_files, "../../evil.txt": b"x", "/etc/evil": b"x"}),
        base_model,
        "Climber",
    )
    assert sorted(path.name for path in version.folder.iterdir()) == [CONFIG, WEIGHTS]
    assert not list(Path(settings.HOME).rglob("evil*"))


def test_a_file_that_is_not_a_zip_and_a_base_that_does_not_fit_are_rejected(
    alice, base_model, adapter_files, tmp_path
):
    from tests import tiny
    from training.catalog.models import BaseModel

    assert_rejected(alice, base_model, [SimpleUploadedFile("a.zip", b"PK\x03\x04 no")], "not_a_zip")
    wide_base = BaseModel.objects.create(
        name="wide",
        source="folder",
        location=str(tiny.make_model(tmp_path / "wide", hidden=64)),
        state="ready",
        metadata={},
    )
    assert_rejected(alice, wide_base, make_upload(adapter_files), "wrong_shape", "wide")
    shallow_base = BaseModel.objects.create(
        name="shallow",
        source="folder",
        location=str(tiny.make_model(tmp_path / "one", layers=1)),
        state="ready",
        metadata={},
    )
    assert_rejected(
        alice,
        shallow_base,
        make_upload(adapter_files),
        "unknown_module",
        "shallow",
        "model.layers.1",
    )


def assert_rejected(user, base, uploads, code, *facts):
    with raises_user_error(code=code, naming=facts):
        imports.import_version(user, uploads, base, "Lights")
    assert not AdapterVersion.objects.exists()
    assert not list((Path(settings.HOME) / "adapters").glob(".import-*"))


def test_the_two_files_are_imported_and_other_files_are_ignored(
    as_alice, base_model, adapter_files
):
    uploads = [
        SimpleUploadedFile(name, content)
        for name, content in {**adapter_files, "optimizer.pt": b"pickled"}.items()
    ]
    answer = as_alice.post(
        "/adapters/import", {"name": "Both", "base": base_model.pk, "file": uploads}
    )
    version = AdapterVersion.objects.get()
    assert answer.url == f"/adapters/{version.pk}"
    assert sorted(path.name for path in version.folder.iterdir()) == sorted(adapter_files)


@pytest.mark.parametrize("file_name", [WEIGHTS, CONFIG])
def test_one_of_the_two_files_is_not_enough(alice, base_model, adapter_files, file_name):
    assert_rejected(
        alice,
        base_model,
        [SimpleUploadedFile(file_name, adapter_files[file_name])],
        "missing_file",
        WEIGHTS,
        CONFIG,
    )


def test_several_zips_are_rejected(alice, base_model):
    assert_rejected(
        alice,
        base_model,
        [SimpleUploadedFile(name, b"PK") for name in ("a.zip", "b.zip")],
        "several_files",
    )


def test_the_import_page_keeps_the_input_and_shows_the_error(as_alice, base_model):
    file = SimpleUploadedFile("a.zip", b"no zip")
    answer = as_alice.post(
        "/adapters/import", {"file": file, "base": base_model.pk, "name": "My lights"}
    )
    assert answer.status_code == 400
    page = answer.content.decode()
    assert "Not a zip file" in page
    assert 'value="My lights"' in page
