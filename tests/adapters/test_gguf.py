"""A GGUF file answers in llama.cpp as its model does in torch, or it is not kept."""

import shutil

import pytest
import torch

from adapters.export import gguf, merge
from adapters.lanes import PROGRAMS
from adapters.programs import gguf_export
from adapters.programs.gguf_file import export
from adapters.programs.llama_cpp import BrokenGGUF, answers
from tests import tiny
from tests.engine import families
from tests.shelf import register_version, train_version
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
    """A tiny model of each family, with the tests' tokenizer."""
    folder = tmp_path_factory.mktemp(request.param) / request.param
    tokenizer = tiny.make_tokenizer()
    torch.manual_seed(3)
    made = families.make_family_model(request.param)
    made.resize_token_embeddings(len(tokenizer))
    # llama.cpp knows one rhythm of attention: every sixth layer is full
    if request.param == "gemma3":
        made.config.layer_types = ["sliding_attention"] * 2
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def order(folder, target, quantization):
    return {
        "model": str(folder),
        "target": str(target),
        "quantization": quantization,
        "prompts": PROMPTS,
    }


@pytest.mark.parametrize("quantization", ["f32", "f16", "q8_0"])
def test_every_family_is_run_back_and_answers_the_same(model, tmp_path, quantization):
    told = gguf_export.make(order(model, tmp_path / "m.gguf", quantization))
    assert told["bytes"] == (tmp_path / "m.gguf").stat().st_size
    figures = told["parity"]
    assert figures["tokens"] > 10
    assert figures["largest_difference"] < {"f32": 0.01, "f16": 0.05, "q8_0": 0.5}[quantization]
    if quantization == "f32":
        assert figures["same_choice"] > 0.98
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_a_file_that_answers_unlike_its_model_is_not_kept(tiny_model, tmp_path, monkeypatch):
    def spoilt(folder, target, quantization):
        from transformers import AutoModelForCausalLM

        other = shutil.copytree(folder, tmp_path / "other")
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            for parameter in loaded.parameters():
                parameter.copy_(torch.randn_like(parameter))
        loaded.save_pretrained(other)
        export(other, target, quantization)

    monkeypatch.setattr(gguf_export, "export", spoilt)
    with pytest.raises(UserError, match="answers unlike its model"):
        gguf_export.make(order(tiny_model, tmp_path / "out" / "m.gguf", "f16"))
    assert not list((tmp_path / "out").iterdir())


def test_a_broken_file_is_a_sentence_and_kills_nobody(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + b"\0" * 100)
    with pytest.raises(BrokenGGUF, match="ended with code"):
        answers(tmp_path / "m.gguf", [[1, 2]], 3)


def test_weights_that_are_not_numbers_are_refused(tiny_model, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(tiny_model, tmp_path / "nan")
    held = load_file(folder / "model.safetensors")
    next(iter(held.values())).fill_(float("nan"))
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="not finite"):
        export(folder, tmp_path / "m.gguf", "f16")
    assert not (tmp_path / "m.gguf").exists()


@pytest.mark.django_db
def test_a_version_is_merged_first_then_exported_downloaded_and_deleted(
    as_alice, alice, base_model, data, device, no_bell, engine_once
):
    version = train_version(alice, base_model, data, engine_once)
    with pytest.raises(Conflict, match="Merge this version"):
        gguf.export_gguf(alice, version, "f16")
    with pytest.raises(UserError, match="must be one of"):
        gguf.export_gguf(alice, version, "../x")
    merge.merge_version(alice, version)
    run_lane(PROGRAMS)
    task = gguf.export_gguf(alice, version, "f16")
    with pytest.raises(NotFound):
        gguf.get_gguf(version, "f16")
    run_lane(PROGRAMS)
    task.refresh_from_db()
    assert (task.state, task.error) == (JobState.DONE, "")
    assert task.result["parity"]["same_answers"] == task.result["parity"]["prompts"]
    path = gguf.get_gguf(version, "f16")
    answer = as_alice.get(f"/adapters/{version.pk}/gguf/f16")
    assert answer["Content-Disposition"] == 'attachment; filename="Lights-v1-f16.gguf"'
    assert answer["Content-Length"] == str(path.stat().st_size)
    assert as_alice.get(f"/adapters/{version.pk}/merged.zip").status_code == 200
    assert as_alice.get(f"/adapters/{version.pk}/gguf/q8_0").status_code == 404
    assert "GGUF f16" in as_alice.get(f"/adapters/{version.pk}/exports").content.decode()
    as_alice.post(f"/adapters/{version.pk}/delete", {"name": "Lights v1"})
    assert not path.exists()
    assert not Job.objects.exists()
    assert not path.parent.exists() and not version.merged_folder.exists()


@pytest.mark.django_db
def test_what_has_no_whole_model_says_so(alice, run):
    version = register_version(run)
    version.method = "prompt"
    with pytest.raises(Conflict, match="Prompt tuning has no whole model"):
        gguf.export_gguf(alice, version, "f16")
