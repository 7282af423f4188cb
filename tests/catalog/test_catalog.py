import json
import re
import shutil
import struct
import subprocess
import sys

import pytest
from django.utils import timezone
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save_file

from tests.user_errors import raises_user_error
from training.catalog import services
from training.catalog.metadata import UnsupportedModel, read_model_metadata
from training.catalog.models import BaseModel, ModelState
from training.catalog.safetensors_header import DTYPE_BITS, has_elements
from training.errors import NotAllowed, UserError
from training.jobs.models import Job
from training.jobs.recovery import recover_lost_jobs
from training.jobs.runner import run_lane
from training.process_identity import get_host_name


@pytest.fixture
def folder(tmp_path, tiny_model):
    return shutil.copytree(tiny_model, tmp_path / "copy")


def change_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_metadata_is_read_from_the_files_without_torch(folder):
    metadata = read_model_metadata(folder)
    assert metadata["architecture"] == "LlamaForCausalLM"
    assert metadata["layers"] == 2
    assert metadata["context_length"] == 256
    assert metadata["dtype"] == "F32"
    assert metadata["parameters"] * 4 == pytest.approx(metadata["bytes"], rel=0.1)
    assert "im_start" in metadata["chat_template"]


def test_a_model_may_have_no_chat_template(folder):
    (folder / "chat_template.jinja").unlink()
    assert read_model_metadata(folder)["chat_template"] == ""


def test_the_license_comes_from_the_model_card(folder):
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Model\n")
    assert read_model_metadata(folder)["license"] == "apache-2.0"


def test_pickled_weights_are_rejected(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with raises_user_error(UnsupportedModel, code="pickled_weights", naming=("pytorch_model.bin",)):
        read_model_metadata(folder)


def test_a_pickle_named_safetensors_is_rejected_and_not_run(folder, tmp_path):
    canary = tmp_path / "canary"
    (folder / "model.safetensors").write_bytes(
        b"cos\nsystem\n(S'touch " + str(canary).encode() + b"'\ntR."
    )
    with raises_user_error(UnsupportedModel, code="broken_header", naming=("model.safetensors",)):
        read_model_metadata(folder)
    assert not canary.exists()


@pytest.mark.parametrize(
    "values",
    [
        {"auto_map": {"AutoModelForCausalLM": "evil.Model"}},
        {"_attn_implementation_internal": "someone/kernel"},
        {"trust_remote_code": True},
        {"text_config": {"auto_map": {"AutoConfig": "evil.Config"}}},
    ],
)
def test_a_config_that_names_code_is_rejected(folder, values):
    change_config(folder, **values)
    with raises_user_error(UnsupportedModel, code="runs_code", naming=("config.json",)):
        read_model_metadata(folder)


def test_a_model_that_is_no_causal_lm_is_rejected(folder):
    change_config(folder, architectures=["BertForMaskedLM"])
    with raises_user_error(UnsupportedModel, code="not_causal_lm", naming=("BertForMaskedLM",)):
        read_model_metadata(folder)


@pytest.mark.parametrize(
    "value",
    [
        [1],
        "x",
        {"architectures": "x"},
        {"architectures": [1]},
        {"architectures": ["XForCausalLM"], "text_config": 3},
    ],
)
def test_a_malformed_config_is_an_error_message_and_no_crash(folder, value):
    (folder / "config.json").write_text(json.dumps(value))
    try:
        read_model_metadata(folder)
    except UnsupportedModel as error:
        assert error.message


def write_header(folder, value, length=None):
    raw = json.dumps(value).encode()
    (folder / "model.safetensors").write_bytes(
        struct.pack("<Q", len(raw) if length is None else length) + raw + b"\0" * 64
    )


@pytest.mark.parametrize(
    "tensor",
    [
        {"dtype": "F32", "shape": [4], "data_offsets": [0, 99999]},
        {"dtype": "F32", "shape": [2**60], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [4], "data_offsets": [8, 24]},
        {"dtype": "F32", "shape": ["a"], "data_offsets": [0, 16]},
        {"dtype": "F32", "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [4], "data_offsets": ["a", "b"]},
        {"dtype": "Q9", "shape": [4], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
        "nonsense",
    ],
)
def test_an_invalid_safetensors_header_is_rejected(folder, tensor):
    write_header(folder, {"x": tensor})
    with pytest.raises(UnsupportedModel):
        read_model_metadata(folder)


def test_a_header_of_2_to_the_60_bytes_is_rejected_without_reading_it(folder):
    write_header(folder, {}, length=2**60)
    with raises_user_error(UnsupportedModel, code="broken_header", naming=("model.safetensors",)):
        read_model_metadata(folder)


def test_overlapping_tensors_are_rejected(folder):
    entry = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    write_header(folder, {"a": entry, "b": entry})
    with raises_user_error(UnsupportedModel, code="bad_offsets", naming=("model.safetensors",)):
        read_model_metadata(folder)


def test_a_duplicate_key_in_a_header_is_rejected(folder):
    entry = b'"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}'
    raw = b"{" + entry + b", " + entry + b"}"
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw + b"\0" * 16)
    with pytest.raises(UnsupportedModel, match="duplicate key"):
        read_model_metadata(folder)


def read_library_dtypes():
    """All dtypes of the installed safetensors. Its error for an unknown dtype lists them."""
    entry = {"a": {"dtype": "?", "shape": [0], "data_offsets": [0, 0]}}
    raw = json.dumps(entry).encode()
    try:
        deserialize(struct.pack("<Q", len(raw)) + raw)
    except SafetensorError as error:
        return re.findall(r"`(\w+)`", str(error).partition("expected one of")[2])
    raise AssertionError("safetensors accepted a dtype that does not exist")


def test_every_dtype_of_safetensors_is_supported():
    assert set(read_library_dtypes()) == set(DTYPE_BITS)


@pytest.mark.parametrize("dtype", sorted(DTYPE_BITS))
def test_metadata_of_every_dtype_is_read(folder, dtype):
    size = 4 * DTYPE_BITS[dtype] // 8
    entry = {"a.weight": {"dtype": dtype, "shape": [2, 2], "data_offsets": [0, size]}}
    raw = json.dumps(entry).encode()
    content = struct.pack("<Q", len(raw)) + raw + b"\0" * size
    assert deserialize(content)[0][0] == "a.weight"
    (folder / "model.safetensors").write_bytes(content)
    metadata = read_model_metadata(folder)
    assert (metadata["dtype"], metadata["parameters"]) == (dtype, 4)


def test_a_shape_with_a_huge_product_is_rejected_quickly():
    assert not has_elements((2**62,) * 1_000_000, 128, 32)
    assert has_elements((2**62, 2**62, 0), 0, 32)


def test_only_an_admin_adds_a_folder(people, folder, settings):
    settings.MODEL_FOLDERS = [folder.parent]
    model = services.add_folder(people["admin"], str(folder))
    assert model.state == ModelState.READY
    with pytest.raises(NotAllowed):
        services.add_folder(people["alice"], str(folder))


@pytest.mark.parametrize("path", ["/etc", "{root}/../../etc", "{root}/link", "{root}\0x"])
def test_a_folder_outside_the_allowed_ones_is_rejected(people, tmp_path, settings, path):
    root = tmp_path / "root"
    root.mkdir()
    (root / "link").symlink_to("/etc")
    settings.MODEL_FOLDERS = [root]
    with pytest.raises(UserError):
        services.add_folder(people["admin"], path.replace("{root}", str(root)))


@pytest.mark.parametrize("hub_id", ["nope", "a/b/c", "-x/y", "/a", "a/"])
def test_an_invalid_hub_id_is_rejected(people, hub_id):
    with raises_user_error(field="location", naming=(hub_id,)):
        services.add_from_hub(people["admin"], hub_id, "")


def test_a_failed_import_has_its_error_and_can_be_retried(people, monkeypatch):
    model = services.add_from_hub(people["admin"], "someone/model", "")
    output = '{"done": 0.1, "message": "asking"}\\n{"error": "The hub cannot be reached."}\\n'
    program = f"print('{output}', end=''); raise SystemExit(65)"
    monkeypatch.setattr(services, "import_command", lambda _model: [sys.executable, "-c", program])
    run_lane(services.IMPORT_JOB.lane)
    model.refresh_from_db()
    assert (model.state, model.error) == (ModelState.FAILED, "The hub cannot be reached.")
    services.retry_import(people["admin"], model)
    model.refresh_from_db()
    assert model.state == ModelState.WAITING


def test_an_import_of_a_dead_worker_is_started_again(people, monkeypatch):
    model = services.add_from_hub(people["admin"], "a/b", "")
    BaseModel.objects.update(state=ModelState.IMPORTING)
    with subprocess.Popen([sys.executable, "-c", ""]) as dead:
        name = f"{get_host_name()}:{dead.pid}:1"
    Job.objects.update(state="running", worker=name, heartbeat_at=timezone.now())
    recover_lost_jobs()
    monkeypatch.setattr(services, "import_command", lambda _model: [sys.executable, "-c", ""])
    monkeypatch.setattr(services, "read_model_metadata", lambda _folder: {"parameters": 1})
    run_lane(services.IMPORT_JOB.lane)
    model.refresh_from_db()
    assert (model.state, model.progress, model.metadata) == (ModelState.READY, 1, {"parameters": 1})


def test_the_models_page_shows_metadata_progress_and_errors(as_alice, base_model):
    BaseModel.objects.create(
        name="coming",
        source="hub",
        location="a/b",
        state="importing",
        progress=0.4,
        progress_message="downloading",
    )
    BaseModel.objects.create(
        name="broken", source="hub", location="a/c", state="failed", error="It is gated."
    )
    page = as_alice.get("/models").content.decode()
    for text in ("tiny-llama", "LlamaForCausalLM", "downloading", "It is gated.", "Included"):
        assert text in page
    assert "Add a base model" not in page
    assert as_alice.post("/models/add", {"source": "folder", "location": "/x"}).status_code == 403


def test_dtypes_of_all_weight_files_are_counted(tmp_path, folder):
    import numpy as np

    save_file({"a": np.zeros((3, 5), np.float16)}, folder / "extra.safetensors")
    assert read_model_metadata(folder)["dtype"] == "F16 + F32"
