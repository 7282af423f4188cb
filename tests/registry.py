"""Adapter versions for tests: some with dummy files, some really trained."""

from adapters.models import AdapterVersion
from adapters.registry import services
from tests import tiny
from tests.launching import launch_run
from training.engine.outcome import read_result

LORA_METHODS = ("lora", "qlora")
FAST_SETTINGS = {"max_steps": 30, "learning_rate": 0.02, "exact_match_rows": 0}


def register_version(run, *, name="Lights", number=1, weights=b"x", **more):
    """A version of the run's owner with the two files of a PEFT folder."""
    content = {"adapter_model.safetensors": weights, "adapter_config.json": b"{}"}
    version = AdapterVersion.objects.create(
        owner=run.owner,
        team=run.team,
        name=name,
        number=number,
        base_model=run.base_model,
        run=run,
        data=run.data,
        method="lora",
        step=number,
        sha256="a",
        size_bytes=sum(map(len, content.values())),
        files={
            file: {"sha256": "a" if file.endswith("safetensors") else "b", "bytes": len(data)}
            for file, data in content.items()
        },
        **more,
    )
    version.folder.mkdir(parents=True, exist_ok=True)
    for file, data in content.items():
        (version.folder / file).write_bytes(data)
    return version


def train_version(user, base_model, data, engine, *, name="Lights", **settings):
    """Train a run with the real engine in this process and register its version."""
    defaults = {
        n: value
        for n, value in tiny.SETTINGS.items()
        if settings.get("method", "lora") in LORA_METHODS or n not in ("rank", "alpha")
    }
    run = launch_run(
        user,
        base_model=base_model,
        data=data,
        settings={**defaults, **FAST_SETTINGS, **settings},
        name=name,
    )
    assert engine([str(run.folder)]) == 0
    services.register_run_result(run, read_result(run.folder))
    run.state = "finished"
    run.save()
    return run.versions.get()
