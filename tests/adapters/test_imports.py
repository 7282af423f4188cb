"""Importing adapters trained elsewhere: valid files are registered, and everything else is rejected
without being unpacked, executed or stored.
"""

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
from adapters.programs import adapter_import
from adapters.registry import imports
from tests.adapters.importing import (
    CONFIG,
    WEIGHTS,
    assert_rejected,
    compute_logits,
    compute_version_logits,
    make_upload,
    read_folder,
    replace_config,
)
from tests.engine.wrapped_models import CPU
from tests.registry import train_version
from training.engine.modeling.model import load_base
from training.engine.modeling.weights import load_adapter

pytestmark = [pytest.mark.django_db, pytest.mark.once]
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


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
        ({"megatron_core": "os"}, "unsupported_setting", ("megatron_core",)),
        ({"modules_to_save": ["lm_head"]}, "unsupported_setting", ("modules_to_save",)),
        ({"layer_replication": [[0, 2]]}, "unsupported_setting", ("layer_replication",)),
        ({"bias": "all"}, "unsupported_setting", ("bias",)),
        ({"r": 10**9}, "invalid_size", ("r", "4,096")),
        ({"r": 3}, "wrong_shape", ("lora_",)),
        ({"rank_pattern": {"(a+)+$": 4}}, "invalid_pattern", ("rank_pattern",)),
        ({"rank_pattern": ["q_proj"]}, "invalid_pattern", ("rank_pattern",)),
        ({"rank_pattern": {"q_proj": 4.0}}, "invalid_size", ("rank_pattern of q_proj",)),
        ({"alpha_pattern": {"q_proj": "9"}}, "invalid_size", ("alpha_pattern of q_proj",)),
        ({"trainable_token_indices": [1]}, "unsupported_setting", ("trainable_token_indices",)),
        ({"bias": "lora_only"}, "unsupported_setting", ("bias",)),
        ({"a_new_key": 1}, "unsupported_setting", ("a_new_key",)),
        ({"init_lora_weights": "pissa"}, "base_changing_init", ("pissa",)),
        ({"init_lora_weights": "pissa_niter_16"}, "base_changing_init", ("pissa_niter_16",)),
        ({"init_lora_weights": "OLoRA"}, "base_changing_init", ("OLoRA",)),
        ({"init_lora_weights": "corda"}, "base_changing_init", ("corda",)),
        ({"init_lora_weights": "loftq"}, "base_changing_init", ("loftq",)),
        ({"init_lora_weights": "lora_ga"}, "base_changing_init", ("lora_ga",)),
        ({"init_lora_weights": "mica"}, "unsupported_setting", ("mica",)),
        ({"task_type": "SEQ_CLS"}, "unsupported_task", ("SEQ_CLS",)),
        ({"lora_alpha": "8"}, "invalid_size", ("lora_alpha",)),
        ({"lora_alpha": float("inf")}, "invalid_json", ("lora_alpha",)),
        ({"target_modules": ["q_proj"]}, "untargeted_module", ("layers_to_transform",)),
        (
            {"layers_to_transform": [0], "target_modules": LINEAR},
            "untargeted_module",
            ("model.layers.1",),
        ),
        (
            {"layers_to_transform": 1, "target_modules": LINEAR},
            "untargeted_module",
            ("model.layers.0",),
        ),
        (
            {
                "layers_to_transform": [0, 1],
                "layers_pattern": "blocks",
                "target_modules": LINEAR,
            },
            "untargeted_module",
            ("model.layers",),
        ),
        ({"exclude_modules": ["k_proj"]}, "untargeted_module", ("k_proj",)),
        ({"target_modules": [1]}, "invalid_value", ("target_modules",)),
        ({"layers_pattern": 5}, "invalid_value", ("layers_pattern",)),
        ({"layers_to_transform": ["1"]}, "invalid_value", ("layers_to_transform",)),
        ({"layers_to_transform": {"a": 1}}, "invalid_value", ("layers_to_transform",)),
        ({"use_dora": "yes"}, "invalid_value", ("use_dora",)),
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
        (
            lambda files: {f"{n}/{name}": data for n in "ab" for name, data in files.items()},
            "duplicate_file",
            (WEIGHTS,),
        ),
        (lambda files: {**files, f".\\{CONFIG}": b"{}"}, "duplicate_file", (WEIGHTS,)),
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
        (lambda files: {**files, **{f"f{n}": b"" for n in range(300)}}, "too_many_entries", (299,)),
    ],
)
def test_a_malformed_zip_is_rejected(
    alice, base_model, adapter_files, change, code, facts, monkeypatch
):
    monkeypatch.setattr(adapter_import, "MAX_ENTRIES", 299)
    assert_rejected(alice, base_model, make_upload(change(adapter_files)), code, *facts)


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: f"backup\\me\\{name}",
        lambda name: f"a/b/c/d/{name}",
        lambda name: f"./{name}",
    ],
)
def test_the_adapter_is_found_in_any_folder_beside_checkpoints_and_logs(
    alice, base_model, adapter_files, rename
):
    files = {rename(name): content for name, content in adapter_files.items()}
    checkpoints = {
        rename(f"checkpoint-{n}/{name}"): b"{}" for n in (5, 10) for name in adapter_files
    }
    logs = {rename(f"logs/{n}.txt"): b"x" for n in range(400)}
    version = imports.import_version(
        alice, make_upload({**checkpoints, **logs, **files}), base_model, "Folder"
    )
    assert (version.folder / WEIGHTS).read_bytes() == adapter_files[WEIGHTS]


def test_pickled_weights_beside_the_config_are_named(alice, base_model, adapter_files):
    uploads = [
        SimpleUploadedFile(CONFIG, adapter_files[CONFIG]),
        SimpleUploadedFile("adapter_model.bin", pickle.dumps(1)),
    ]
    assert_rejected(alice, base_model, uploads, "pickled_weights", WEIGHTS)


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["o_proj", "up_proj"]},  # no task_type, so PEFT writes auto_mapping
        {"target_modules": ["o_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
        {"target_modules": ["k_proj"], "layers_to_transform": 0},
        {"target_modules": "all-linear", "exclude_modules": ["lm_head"]},
        {"target_modules": ["lm_head", "down_proj"]},
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["embed_tokens", "lm_head"], "task_type": "CAUSAL_LM"},
        {"target_modules": ["v_proj"], "dtype": torch.bfloat16},
        {"target_modules": ["v_proj"], "use_rslora": True, "init_lora_weights": "gaussian"},
        {"target_modules": ["v_proj", "q_proj"], "rank_pattern": {"layers.1.self_attn.q_proj": 5}},
        {"target_modules": ["v_proj", "q_proj"], "alpha_pattern": {"q_proj": 16}},
        {"target_modules": ["v_proj"], "use_dora": True, "init_lora_weights": "orthogonal", "r": 4},
        {
            "is_ia3": True,
            "target_modules": ["v_proj", "down_proj"],
            "feedforward_modules": ".*down_.*",
        },
    ],
)
def test_an_imported_adapter_has_the_logits_of_plain_peft(alice, base_model, peft_folder, config):
    folder, expected = peft_folder(**config)
    version = imports.import_version(alice, make_upload(read_folder(folder)), base_model, "PEFT")
    before = compute_logits(load_base(base_model.folder, torch.float32, CPU))
    logits = compute_version_logits(version)
    torch.testing.assert_close(logits, expected)
    assert (logits - before).abs().max() > 0.01
    assert "base_layer" not in str((version.folder / WEIGHTS).read_bytes()[:5000])


def test_what_unsloth_adds_to_the_config_is_not_kept(alice, base_model, peft_folder):
    folder, _expected = peft_folder(target_modules=["q_proj"])
    mapping = {"base_model_class": "M", "parent_library": "os", "unsloth_fixed": True}
    files = replace_config(read_folder(folder), auto_mapping=mapping, task_type=None)
    version = imports.import_version(alice, make_upload(files), base_model, "Unsloth")
    config = json.loads((version.folder / CONFIG).read_text())
    assert "auto_mapping" not in config
    assert config["task_type"] == "CAUSAL_LM"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_copy_of_a_base_weight_may_be_less_precise(alice, base_model, peft_folder, dtype):
    folder, _expected = peft_folder(target_modules=["lm_head"], dtype=dtype)
    version = imports.import_version(alice, make_upload(read_folder(folder)), base_model, "Half")
    assert version.size_bytes < 20_000


@pytest.mark.parametrize("resized", [False, True])
def test_a_copy_of_a_base_weight_that_differs_is_rejected(alice, base_model, peft_folder, resized):
    from safetensors.torch import load, save

    folder, _expected = peft_folder(target_modules=["lm_head"])
    files = read_folder(folder)
    tensors = load(files[WEIGHTS])
    name = "base_model.model.lm_head.base_layer.weight"
    tensors[name][0, 0] += 0.001
    if resized:
        tensors[name] = torch.cat([tensors[name], tensors[name][:2]])
    files[WEIGHTS] = save(tensors)
    assert_rejected(alice, base_model, make_upload(files), "unknown_tensor", "lm_head")


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": "lm_head,q_proj"},
        {"target_modules": "embed_tokens,lm_head"},
        {"init_lora_weights": "pissa", "target_modules": "lm_head,v_proj"},
        {"init_lora_weights": "olora"},
        {"use_dora": True, "rank_pattern": "q_proj=2"},
        {"alpha_pattern": "up_proj=4999"},
        {"method": "prefix", "prefix_projection": True},
        {"method": "qlora", "init_lora_weights": "loftq"},
    ],
)
def test_a_version_that_snapml_trained_can_be_imported_again(
    alice, base_model, data, device, no_queue, engine_once, changes
):
    version = train_version(alice, base_model, data, engine_once, max_steps=2, **changes)
    files = {name: (version.folder / name).read_bytes() for name in (WEIGHTS, CONFIG)}
    again = imports.import_version(alice, make_upload(files), base_model, "Again")
    torch.testing.assert_close(compute_version_logits(version), compute_version_logits(again))
    # No copy of the whole head
    assert "base_layer" not in str((version.folder / WEIGHTS).read_bytes()[:5000])


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
