"""One object of every kind that has a URL. All belong to alice and are shared with her team."""

import json
from pathlib import Path

import pytest

from adapters.evaluation.benchmark import BENCHMARK_METHODS
from adapters.export import gguf
from adapters.models import Deployment, PromptSet
from tests import tiny
from tests.registry import register_version
from training.datasets.models import Upload
from training.errors import UserError
from training.jobs.models import Job
from training.jobs.services import enqueue_job
from training.people.models import Team
from training.runs.models import Sweep
from training.webhooks.models import Webhook


@pytest.fixture
def no_program(monkeypatch, settings):
    """Disables the programs that count tokens and simulate steps, and forgets their failures
    afterwards.
    """

    def raise_user_error(*_args, **_kwargs):
        raise UserError("not here", code="preview_failed")

    monkeypatch.setattr("training.runs.forecast.token_lengths.run_preview", raise_user_error)
    monkeypatch.setattr("training.runs.worker.oom_recovery.get_estimator", raise_user_error)
    yield
    for failed_path in (Path(settings.HOME) / "data").rglob("*.failed"):
        failed_path.unlink()


@pytest.fixture
def things(run, base_model, data, alice, device):
    """The ids in URLs, by the name of the URL parameter."""
    shared = {"owner": alice, "team": run.team}
    file_format = {
        "kind": "jsonl",
        "zipped": False,
        "delimiter": ",",
        "header": True,
        "unit": "paragraph",
    }
    mapping = {
        "row_format": "messages",
        "columns": {"messages": "messages"},
        "split": "",
        "is_certain": True,
    }
    files = [{"file": "0", "name": "a.jsonl", "split": "", "format": file_format}]
    upload = Upload.objects.create(
        **shared, name="Lights", source="x", files=files, mapping=mapping
    )
    upload.folder.mkdir(parents=True, exist_ok=True)
    (upload.folder / "0").write_bytes(b"".join(tiny.encode_jsonl(tiny.ROWS)))
    (upload.folder / "sample.json").write_text(json.dumps([[1, tiny.ROWS[0], ""]]))
    version = register_version(run)
    Deployment.objects.create(**shared, name="halve", version=version)
    params = {"quantization": "f16"}
    job = enqueue_job(alice, gguf.KIND, f"{version.pk}:f16", subjects=[version], params=params)
    Job.objects.filter(pk=job.pk).update(state="done")
    gguf.gguf_path(version, "f16").parent.mkdir(parents=True, exist_ok=True)
    gguf.gguf_path(version, "f16").write_bytes(b"GGUF")
    rows = [{"messages": [{"role": "user", "content": "hi"}], "expected": "yes"}]
    return {
        "other_id": register_version(run, number=2).pk,
        "quantization": "f16",
        "prompts_id": PromptSet.objects.create(**shared, name="Two", rows=rows).pk,
        "run_id": run.pk,
        "dataset_id": data.dataset_id,
        "version_id": data.pk,
        "upload_id": upload.pk,
        "adapter_id": version.pk,
        "model_id": base_model.pk,
        "sweep_id": Sweep.objects.create(
            **shared, name="Grid", grid={"method": list(BENCHMARK_METHODS)}
        ).pk,
        "team_id": Team.objects.get(name="voice").pk,
        "token_id": 1,
        "webhook_id": Webhook.objects.create(
            user=alice, url="https://example.com/x", secret="s"
        ).pk,
        "device_id": device.pk,
        "pool_id": device.pool_id,
        "name": "halve",
        "key": "smart_home",
        "source": "ready-models",
        "username": "bob",
    }
