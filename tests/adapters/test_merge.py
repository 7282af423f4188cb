"""Merge: the merged model answers as its adapter does, or the merge fails and leaves nothing."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from django.conf import settings

from adapters.export import merge
from adapters.lanes import PROGRAMS
from adapters.programs import merge as program
from adapters.programs import parity
from tests import tiny
from tests.engine.wrapped_models import CPU
from tests.registry import register_version, train_version
from tests.user_errors import raises_user_error
from training.catalog.models import BaseModel
from training.engine.modeling.model import load_base
from training.errors import Conflict
from training.jobs.models import Job, JobState
from training.jobs.runner import run_lane

pytestmark = [pytest.mark.django_db, pytest.mark.once]


@pytest.fixture
def train_adapter(alice, base_model, data, device, no_queue, engine_once):
    def train(method="lora", base=base_model, **settings):
        return train_version(alice, base, data, engine_once, method=method, **settings)

    yield train
    shutil.rmtree(Path(settings.HOME) / "merged", ignore_errors=True)


def merge_params(version):
    return {
        "base": str(version.base_model.folder),
        "adapter": str(version.folder),
        "method": version.method,
        "target": str(version.merged_folder),
        "prompts": merge.get_parity_prompts(version),
    }


@pytest.mark.parametrize("method", ["lora", "qlora", "ia3"])
def test_a_merged_model_answers_as_its_adapter_up_to_16_bit_rounding(train_adapter, method, capsys):
    version = train_adapter(method)
    result = program.run_merge(merge_params(version))["parity"]
    assert result["same_answers"] == result["prompts"] > 1
    assert result["divergence"] < 1e-5 < result["effect"]
    assert result["largest_difference"] < 0.05
    merged_model = load_base(version.merged_folder, torch.float16, CPU)
    assert {parameter.dtype for parameter in merged_model.parameters()} == {torch.float16}


def test_a_worker_merges_in_the_background_and_reports_progress(train_adapter, alice):
    version = train_adapter()
    job = merge.merge_version(alice, version)
    assert not merge.is_merged(version)
    run_lane(PROGRAMS)
    job.refresh_from_db()
    assert (job.state, job.error) == (JobState.DONE, "")
    assert job.result["parity"]["prompts"] == job.progress_total / 3
    assert merge.is_merged(version)
    assert merge.merge_version(alice, version) == job  # done once


def test_a_merge_that_lost_its_adapter_fails_and_leaves_nothing(train_adapter, monkeypatch):
    version = train_adapter()
    monkeypatch.setattr(
        program, "merge_adapter", lambda base, *_: load_base(base, torch.float16, CPU)
    )
    with raises_user_error(code="adapter_lost"):
        program.run_merge(merge_params(version))
    assert not version.merged_folder.exists()
    assert not list(version.merged_folder.parent.glob(f".{version.pk}.*"))


def test_a_merged_model_without_parity_is_rejected(train_adapter, monkeypatch):
    version, original = train_adapter(), program.merge_adapter

    def merge_wrongly(*args):
        model = original(*args)
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(-1)
        return model

    monkeypatch.setattr(program, "merge_adapter", merge_wrongly)
    with raises_user_error(code="no_parity"):
        program.run_merge(merge_params(version))


def test_an_adapter_without_effect_is_not_merged(train_adapter):
    version = train_adapter(max_steps=1, learning_rate=1e-8)
    with raises_user_error(code="no_effect"):
        program.run_merge(merge_params(version))


def test_a_merge_killed_after_writing_continues_with_the_written_model(train_adapter, monkeypatch):
    version, original = train_adapter(), program.check_merged

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(program, "check_merged", killed)
    with pytest.raises(KeyboardInterrupt):
        program.run_merge(merge_params(version))
    assert not version.merged_folder.exists()
    monkeypatch.setattr(program, "check_merged", original)
    monkeypatch.delattr(program, "merge_adapter")
    result = program.run_merge(merge_params(version))
    assert result["parity"]["same_answers"] == result["parity"]["prompts"]
    assert [path.name for path in version.merged_folder.parent.glob("*")] == [str(version.pk)]


def test_a_merge_killed_while_writing_starts_over(train_adapter, monkeypatch):
    version = train_adapter()
    partial_folder = version.merged_folder.with_name(f".{version.pk}.merging")
    partial_folder.mkdir(parents=True)
    (partial_folder / "model.safetensors").write_bytes(b"half")
    assert program.run_merge(merge_params(version))["bytes"] > 1000
    assert not partial_folder.exists()


def test_a_full_disk_is_reported_before_anything_is_written(train_adapter, monkeypatch):
    version = train_adapter()
    monkeypatch.setattr(
        program.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 10**8)
    )
    with raises_user_error(code="disk_full", naming=("100.0 MB",)):
        program.run_merge(merge_params(version))


def test_a_method_without_merge_is_rejected_at_once(run, alice):
    version = register_version(run)
    version.method = "prefix"
    with pytest.raises(Conflict, match="Prefix tuning cannot be merged"):
        merge.merge_version(alice, version)


def test_a_program_that_fails_leaves_its_error_and_its_params(run, alice):
    version = register_version(run)
    shutil.rmtree(version.folder)
    merge.merge_version(alice, version)
    run_lane(PROGRAMS)
    job = Job.objects.get()
    assert job.state == JobState.FAILED
    assert job.error
    assert json.loads((job.folder / "params.json").read_text())["adapter"] == str(version.folder)


def test_kl_divergence_matches_its_definition():
    true, other = torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[0.5, 0.5, 1.0]])
    p, q = true.softmax(-1), other.softmax(-1)
    assert parity.kl_divergence(true, other) == pytest.approx(
        float((p * (p / q).log()).sum()), rel=1e-5
    )


@pytest.mark.parametrize("targets", ["lm_head", "embed_tokens,q_proj", "embed_tokens,lm_head"])
def test_a_merge_unties_the_head_that_an_adapter_changes(train_adapter, tmp_path, targets):
    folder = tiny.make_model(tmp_path / "tied", is_tied=True)
    base = BaseModel.objects.create(
        name="tied", source="folder", location=str(folder), state="ready", metadata={}
    )
    version = train_adapter(base=base, target_modules=targets)
    result = program.run_merge(merge_params(version))["parity"]
    assert result["divergence"] < 1e-4 < result["effect"]
    config = json.loads((version.merged_folder / "config.json").read_text())
    assert config["tie_word_embeddings"] is False


@pytest.mark.parametrize(
    ("key", "kind", "path"),
    [
        ("{}", "merge", "merge"),
        ("{}:q8_0", "gguf", "gguf?quantization=q8_0"),
        ("{}:merged:ada/lamps", "push", "push?repository=ada/lamps&what=merged"),
    ],
)
def test_reading_the_state_of_a_failed_export_starts_nothing(as_alice, run, key, kind, path):
    version = register_version(run)
    address = f"/api/v1/adapters/{version.pk}/{path}"
    assert as_alice.get(address).status_code == 404
    job = Job.objects.create(
        kind=kind, key=key.format(version.pk), state=JobState.FAILED, error="No space.", tries=3
    )
    for _ in range(3):
        answer = as_alice.get(address)
        assert answer.status_code == 200
        assert (answer.json()["state"], answer.json()["error"]) == ("failed", "No space.")
    job.refresh_from_db()
    assert (job.state, job.tries) == (JobState.FAILED, 3)
