"""Put what a run or one of its checkpoints learned on the shelf, and hand it out again as a zip. It
knows no torch.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from django.db import transaction
from zipstream import ZIP_STORED, ZipStream

from adapters.models import (
    AdapterVersion,
    Numbering,
    file_stem,
)
from adapters.registry.model_card import NAME, Measured, card_of
from adapters.registry.provenance import record_of
from training.engine.file_names import STATE_FILES
from training.engine.files import sha256_file, fsync_path
from training.engine.outcome import Result
from training.errors import Conflict, NotFound
from training.people.models import User
from training.people.visible import may_change
from training.runs.models import Event, Run


def keep(run: Run, result: Result) -> None:
    """What a run left, as a version. A worker that died half-way does it again to the same end."""
    measured = Measured(
        step=result.adapter_step or 0,
        eval_loss=result.eval_loss,
        exact_match=result.exact_match,
        trainable_parameters=result.trainable_parameters,
    )
    put(run, run.folder / "adapter", measured)


def keep_checkpoint(user: User, run: Run, step: int) -> AdapterVersion:
    """A kept checkpoint as a version.

    Raises:
        NotAllowed: the run is not theirs to change.
        NotFound: there is no checkpoint of this step any more; Conflict: it went away while it was
            copied.
    """
    may_change(user, run)
    source = run.folder / "checkpoints" / f"step-{step:08d}"
    if not (source / STATE_FILES[2]).is_file():
        raise NotFound(f"{run.name} keeps no checkpoint of step {step:,}.", field="step")
    losses = (
        Event.objects.filter(run=run, kind="eval", step=step, superseded=False)
        .order_by("-seq")
        .values_list("payload", flat=True)
    )
    measured = Measured(
        step=step,
        eval_loss=next((payload.get("eval_loss") for payload in losses), None),
        trainable_parameters=int(run.plan.get("trainable_parameters") or 0),
    )
    try:
        return put(run, source, measured)
    except OSError as error:
        if (source / STATE_FILES[2]).is_file():
            raise
        raise Conflict(
            f"The checkpoint of step {step:,} was replaced by a newer one just now.", field="step"
        ) from error


def put(run: Run, source: Path, measured: Measured) -> AdapterVersion:
    """Copy a folder of weights to a new version; the same weights of the same run and step are one
    version.
    """
    aside = Path(tempfile.mkdtemp(prefix=".shelf-", dir=run.folder))
    try:
        # Nobody waits in a transaction
        shutil.copytree(source, aside, ignore=shutil.ignore_patterns(*STATE_FILES), dirs_exist_ok=True)
        (aside / NAME).write_text(card_of(run, measured))
        return file_away(run, aside, measured)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def file_away(run: Run, aside: Path, measured: Measured) -> AdapterVersion:
    """The version of what lies ready in a folder, which becomes the version's own."""
    files = facts_of(aside)
    weights = weights_sha256(files)
    with transaction.atomic():
        User.objects.select_for_update().get(pk=run.owner_id)  # one at a time gets the next number
        known: AdapterVersion | None = AdapterVersion.objects.filter(
            run=run, step=measured.step, sha256=weights
        ).first()
        if known is not None and known.folder.is_dir():
            return known
        version = known or AdapterVersion(
            run=run,
            owner=run.owner,
            team=run.team,
            name=run.name,
            number=next_number(run.owner, run.name),
            base_model=run.base_model,
            data=run.data,
            parent=AdapterVersion.objects.filter(pk=run.from_version or 0).first(),
            method=run.method,
            step=measured.step,
            sha256=weights,
            exact_match=measured.exact_match,
            eval_loss=measured.eval_loss,
            trainable_parameters=measured.trainable_parameters,
        )
        version.files, version.size_bytes, version.record = (
            files,
            bytes_of(files),
            record_of(run, measured.step),
        )
        version.save()
        move_in(version, aside)
    return version


def move_in(version: AdapterVersion, aside: Path) -> None:
    """Inside the transaction that makes the row: no row names files that are not there."""
    version.folder.parent.mkdir(exist_ok=True)
    shutil.rmtree(version.folder, ignore_errors=True)
    aside.rename(version.folder)


def next_number(owner: User, name: str) -> int:
    """Inside a transaction that holds the owner's row."""
    numbering, _ = Numbering.objects.get_or_create(owner=owner, name=name)
    numbering.last += 1
    numbering.save()
    return numbering.last


def facts_of(folder: Path) -> dict[str, dict[str, Any]]:
    """Hash and size of every file, each pushed down to the disk."""
    files: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.iterdir()):
        files[path.name] = {"sha256": sha256_file(path), "bytes": path.stat().st_size}
        fsync_path(path)
    return files


def weights_sha256(files: dict[str, dict[str, Any]]) -> str:
    return str(
        next(facts["sha256"] for name, facts in files.items() if name.endswith(".safetensors"))
    )


def bytes_of(files: dict[str, dict[str, Any]]) -> int:
    return sum(facts["bytes"] for facts in files.values())


def zip_stream(version: AdapterVersion) -> Iterator[bytes]:
    """The adapter's files as a zip, made while it is sent. Stored, not packed: weights do not
    shrink.
    """
    archive = ZipStream(compress_type=ZIP_STORED)
    for name in sorted(version.files):
        archive.add_path(version.folder / name, f"{file_stem(version)}/{name}")
    yield from archive
