"""An adapter from elsewhere: what is sound is taken, and nothing else of a zip is believed,
unpacked, run or kept.
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
from training.engine.modeling.model import load_base
from training.engine.modeling.weights import load_adapter
from training.errors import UserError

pytestmark = pytest.mark.django_db
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture
def adapter_files(alice, base_model, data, device, no_queue, engine_once):
    """The files of a true adapter, in memory."""
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
def test_a_folder_that_peft_saved_is_taken_and_answers_as_before(
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
    ("weights", "message"),
    [
        (b"", "would have"),
        (struct.pack("<Q", 2**60) + b"{}", "would have 1,152,921,504,606,846,976 bytes"),
        (pickle.dumps({"a": 1}), "not a safetensors file"),
        (make_header(b"{nope"), "not a safetensors file"),
        (
            make_header(
                b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "a": 1}', b"x" * 8
            ),
            "duplicate key",
        ),
        (
            make_header({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, b"x" * 8),
            "does not match its shape",
        ),
        (
            make_header(
                {**ONE_TENSOR, "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}},
                b"x" * 12,
            ),
            "overlap or have gaps",
        ),
        (make_header(ONE_TENSOR, b"x" * 4), "shorter or longer"),
        (make_header(ONE_TENSOR, b"x" * 80), "shorter or longer"),
        (
            make_header({"a": {"dtype": "O", "shape": [2], "data_offsets": [0, 8]}}, b"x" * 8),
            "header entry of tensor",
        ),
        (
            make_header(
                {"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 8]}}, b"x" * 8
            ),
            "does not match its shape",
        ),
        (
            make_header({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}, b"x" * 8),
            "does not match its shape",
        ),
        (make_header({"__metadata__": {}}), "shorter or longer"),
        (
            make_header({"a": {"dtype": "F4", "shape": [16], "data_offsets": [0, 8]}}, b"x" * 8),
            "of type F4",
        ),
    ],
)
def test_weights_that_lie_are_refused_before_any_library_reads_them(
    alice, base_model, adapter_files, weights, message
):
    check_refused(alice, base_model, make_upload({**adapter_files, WEIGHTS: weights}), message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"auto_mapping": {"parent_library": "os", "base_model_class": "system"}},
            "sets auto_mapping",
        ),
        ({"megatron_core": "os"}, "sets megatron_core"),
        ({"modules_to_save": ["lm_head"]}, "sets modules_to_save"),
        ({"layer_replication": [[0, 2]]}, "sets layer_replication"),
        ({"bias": "all"}, "sets bias"),
        ({"r": 10**9}, "whole number up to 4,096"),
        ({"r": 3}, "fits neither rank 3"),
        ({"rank_pattern": {"(a+)+$": 4}}, "must name modules"),
        ({"peft_type": "XLORA"}, "of type 'XLORA'"),
        ({"peft_type": {"a": 1}}, "of type"),
    ],
)
def test_a_config_that_names_code_or_an_unknown_type_is_refused(
    alice, base_model, adapter_files, changes, message
):
    check_refused(alice, base_model, make_upload(replace_config(adapter_files, **changes)), message)


def test_a_parameter_that_would_overwrite_the_base_is_refused(alice, base_model, adapter_files):
    from safetensors.torch import load, save

    tensors = load(adapter_files[WEIGHTS])
    tensors["base_model.model.lm_head.weight"] = torch.zeros(4, 4)
    check_refused(
        alice,
        base_model,
        make_upload({**adapter_files, WEIGHTS: save(tensors)}),
        "it would change the base itself",
    )
    del tensors["base_model.model.lm_head.weight"]
    tensors.pop(next(name for name in tensors if "lora_B" in name))
    check_refused(
        alice,
        base_model,
        make_upload({**adapter_files, WEIGHTS: save(tensors)}),
        "only one of its two matrices",
    )


@pytest.mark.parametrize("method", ["ia3", "prefix", "prompt", "bottleneck"])
def test_adapters_of_every_kind_that_we_make_can_be_imported(
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
    ("change", "message"),
    [
        (lambda files: {CONFIG: files[CONFIG]}, f"no {WEIGHTS}"),
        (
            lambda files: {CONFIG: files[CONFIG], "adapter_model.bin": pickle.dumps(1)},
            "Pickled weights",
        ),
        (lambda files: {**files, f"b/{WEIGHTS}": b"x"}, f"more than one {WEIGHTS}"),
        (lambda files: {CONFIG: files[CONFIG], f"a/b/{WEIGHTS}": files[WEIGHTS]}, f"no {WEIGHTS}"),
        (
            lambda files: {CONFIG: files[CONFIG], **make_link(WEIGHTS, "/etc/passwd")},
            "a link or a folder",
        ),
        (lambda files: {**files, WEIGHTS: b"\0" * 5_000_000}, "would have 5.0 MB unpacked"),
        (lambda files: {**files, CONFIG: b"[" * 100_000}, "is not JSON|unpacked"),
        (lambda files: {**files, CONFIG: b"[]"}, "must be a JSON object"),
        (lambda files: {**files, **{f"f{n}": b"" for n in range(300)}}, "more than 200 entries"),
    ],
)
def test_a_zip_with_tricks_is_refused(alice, base_model, adapter_files, change, message):
    check_refused(alice, base_model, make_upload(change(adapter_files)), message)


def test_what_climbs_out_of_the_zip_is_never_written(alice, base_model, adapter_files, tmp_path):
    version = imports.import_version(
        alice,
        make_upload({**adapter_files, "../../evil.txt": b"x", "/etc/evil": b"x"}),
        base_model,
        "Climber",
    )
    assert sorted(path.name for path in version.folder.iterdir()) == [CONFIG, WEIGHTS]
    assert not list(Path(settings.HOME).rglob("evil*"))


def test_what_is_no_zip_and_a_base_that_does_not_fit_are_refused(
    alice, base_model, adapter_files, tmp_path
):
    from tests import tiny
    from training.catalog.models import BaseModel

    check_refused(alice, base_model, [SimpleUploadedFile("a.zip", b"PK\x03\x04 no")], "no zip file")
    wide_base = BaseModel.objects.create(
        name="wide",
        source="folder",
        location=str(tiny.make_model(tmp_path / "wide", hidden=64)),
        state="ready",
        metadata={},
    )
    check_refused(alice, wide_base, make_upload(adapter_files), "Choose its true base")
    shallow_base = BaseModel.objects.create(
        name="shallow",
        source="folder",
        location=str(tiny.make_model(tmp_path / "one", layers=1)),
        state="ready",
        metadata={},
    )
    check_refused(
        alice, shallow_base, make_upload(adapter_files), "shallow has no weight 'model.layers.1"
    )


def check_refused(user, base, uploads, message):
    with pytest.raises(UserError, match=message):
        imports.import_version(user, uploads, base, "Lights")
    assert not AdapterVersion.objects.exists()
    assert not list((Path(settings.HOME) / "adapters").glob(".import-*"))


def test_the_two_files_are_taken_as_they_are_and_nothing_that_was_chosen_with_them(
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
    check_refused(
        alice,
        base_model,
        [SimpleUploadedFile(file_name, adapter_files[file_name])],
        "is missing; choose adapter_model",
    )


def test_several_zips_are_refused(alice, base_model):
    check_refused(
        alice,
        base_model,
        [SimpleUploadedFile(name, b"PK") for name in ("a.zip", "b.zip")],
        "Choose one zip, or",
    )


def test_the_page_keeps_what_was_typed_and_tells_what_is_wrong(as_alice, base_model):
    file = SimpleUploadedFile("a.zip", b"no zip")
    answer = as_alice.post(
        "/adapters/import", {"file": file, "base": base_model.pk, "name": "My lights"}
    )
    assert answer.status_code == 400
    page = answer.content.decode()
    assert "This is no zip file" in page
    assert 'value="My lights"' in page
