"""GGUF export: the file answers in llama.cpp as the model does in PyTorch, or it is deleted."""

import shutil

import pytest
import torch

from adapters.export import gguf, merge
from adapters.lanes import PROGRAMS
from adapters.programs import gguf_export
from adapters.programs.gguf_file import write_gguf
from adapters.programs.llama_cpp import BrokenGGUF, generate_answers
from tests import tiny
from tests.engine import families
from tests.registry import register_version, train_version
from tests.user_errors import raises_user_error
from training.errors import Conflict, NotFound, UserError
from training.jobs.models import Job, JobState
from training.jobs.runner import run_lane

pytestmark = pytest.mark.once
PROMPTS = [
    [{"role": "user", "content": "turn on the hall lamp"}],
    [{"role": "user", "content": "is the attic dark"}],
]


@pytest.fixture(scope="module", params=families.FAMILIES)
def model(request, tmp_path_factory):
    """A tiny model of each family with the test tokenizer."""
    folder = tmp_path_factory.mktemp(request.param) / request.param
    tokenizer = tiny.make_tokenizer()
    torch.manual_seed(3)
    network = families.make_family_model(request.param)
    network.resize_token_embeddings(len(tokenizer))
    # llama.cpp supports full attention only in every sixth layer.
    if request.param == "gemma3":
        network.config.layer_types = ["sliding_attention"] * 2
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_params(folder, target, quantization):
    return {
        "model": str(folder),
        "target": str(target),
        "quantization": quantization,
        "prompts": PROMPTS,
    }


@pytest.mark.parametrize("quantization", ["f32", "f16", "q8_0"])
def test_the_file_of_every_family_answers_as_its_model(model, tmp_path, quantization):
    result = gguf_export.export_and_check(make_params(model, tmp_path / "m.gguf", quantization))
    assert result["bytes"] == (tmp_path / "m.gguf").stat().st_size
    figures = result["parity"]
    assert figures["tokens"] > 10
    assert figures["largest_difference"] < {"f32": 0.01, "f16": 0.05, "q8_0": 0.5}[quantization]
    if quantization == "f32":
        assert figures["same_choice"] > 0.98
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_a_file_without_parity_is_deleted(tiny_model, tmp_path, monkeypatch):
    def export_random_weights(folder, target, quantization):
        from transformers import AutoModelForCausalLM

        other = shutil.copytree(folder, tmp_path / "other")
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            for parameter in loaded.parameters():
                parameter.copy_(torch.randn_like(parameter))
        loaded.save_pretrained(other)
        write_gguf(other, target, quantization)

    monkeypatch.setattr(gguf_export, "write_gguf", export_random_weights)
    with raises_user_error(code="no_parity", naming=("f16",)):
        gguf_export.export_and_check(make_params(tiny_model, tmp_path / "out" / "m.gguf", "f16"))
    assert not list((tmp_path / "out").iterdir())


def test_a_broken_file_is_an_error_and_does_not_crash_the_caller(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + b"\0" * 100)
    with pytest.raises(BrokenGGUF, match="exited with code"):
        generate_answers(tmp_path / "m.gguf", [[1, 2]], 3)


def test_weights_that_are_not_finite_are_rejected(tiny_model, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(tiny_model, tmp_path / "nan")
    tensors = load_file(folder / "model.safetensors")
    next(iter(tensors.values())).fill_(float("nan"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="not finite"):
        write_gguf(folder, tmp_path / "m.gguf", "f16")
    assert not (tmp_path / "m.gguf").exists()


@pytest.mark.django_db
def test_a_version_is_merged_exported_downloaded_and_deleted(
    as_alice, alice, base_model, data, device, no_queue, engine_once
):
    version = train_version(alice, base_model, data, engine_once)
    with pytest.raises(Conflict, match="Merge this version"):
        gguf.export_gguf(alice, version, "f16")
    with pytest.raises(UserError, match="must be one of"):
        gguf.export_gguf(alice, version, "../x")
    merge.merge_version(alice, version)
    run_lane(PROGRAMS)
    job = gguf.export_gguf(alice, version, "f16")
    with pytest.raises(NotFound):
        gguf.get_gguf(version, "f16")
    run_lane(PROGRAMS)
    job.refresh_from_db()
    assert (job.state, job.error) == (JobState.DONE, "")
    assert job.result["parity"]["same_answers"] == job.result["parity"]["prompts"]
    path = gguf.get_gguf(version, "f16")
    response = as_alice.get(f"/adapters/{version.pk}/gguf/f16")
    assert response["Content-Disposition"] == 'attachment; filename="Lights-v1-f16.gguf"'
    assert response["Content-Length"] == str(path.stat().st_size)
    assert as_alice.get(f"/adapters/{version.pk}/merged.zip").status_code == 200
    assert as_alice.get(f"/adapters/{version.pk}/gguf/q8_0").status_code == 404
    assert "GGUF f16" in as_alice.get(f"/adapters/{version.pk}/exports").content.decode()
    as_alice.post(f"/adapters/{version.pk}/delete", {"name": "Lights v1"})
    assert not path.exists()
    assert not Job.objects.exists()
    assert not path.parent.exists() and not version.merged_folder.exists()


@pytest.mark.django_db
def test_a_method_without_merge_has_no_gguf_export(alice, run):
    version = register_version(run)
    version.method = "prompt"
    with pytest.raises(Conflict, match="Prompt tuning has no full model"):
        gguf.export_gguf(alice, version, "f16")
