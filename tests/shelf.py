"""An adapter on the shelf, without training one."""

from adapters.models import AdapterVersion


def put_on_shelf(run, *, name="Lights", number=1, weights=b"x"):
    """A version of the run's owner with the two files of a PEFT folder."""
    content = {"adapter_model.safetensors": weights, "adapter_config.json": b"{}"}
    made = AdapterVersion.objects.create(
        owner=run.owner,
        team=run.team,
        name=name,
        number=number,
        base_model=run.base_model,
        run=run,
        method="lora",
        step=1,
        size_bytes=sum(map(len, content.values())),
        files={
            file: {"sha256": "a" if file.endswith("safetensors") else "b", "bytes": len(held)} for file, held in content.items()
        },
    )
    made.folder.mkdir(parents=True, exist_ok=True)
    for file, held in content.items():
        (made.folder / file).write_bytes(held)
    return made
