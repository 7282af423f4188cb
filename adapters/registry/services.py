"""Register the weights of a run or checkpoint as adapter versions, and stream them as a zip."""

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
    VersionCounter,
    file_stem,
)
from adapters.registry.model_card import CARD_FILE, EvalResult, build_card
from adapters.registry.provenance import build_provenance
from training.engine.file_names import STATE_FILES
from training.engine.files import fsync_path, sha256_file
from training.engine.outcome import Result
from training.errors import Conflict, NotFound
from training.people.disk_quota import check_disk_quota
from training.people.models import User
from training.people.permissions import check_changeable
from training.runs.models import Event, Run


def register_run_result(run: Run, result: Result) -> None:
    """Register the result of a run as a version. Safe to repeat after a worker crash."""
    eval_result = EvalResult(
        step=result.adapter_step or 0,
        eval_loss=result.eval_loss,
        exact_match=result.exact_match,
        trainable_parameters=result.trainable_parameters,
    )
    register_weights(run, run.folder / "adapter", eval_result)


def register_checkpoint(user: User, run: Run, step: int) -> AdapterVersion:
    """Register a saved checkpoint as a version.

    Raises:
        NotAllowed: the user may not change the run.
        NotFound: there is no checkpoint of this step.
        Conflict: the checkpoint was deleted while it was copied, or a disk quota would be
            exceeded.
    """
    check_changeable(user, run)
    source = run.folder / "checkpoints" / f"step-{step:08d}"
    if not (source / STATE_FILES[2]).is_file():
        raise NotFound(f"{run.name} has no checkpoint of step {step:,}.", field="step")
    losses = (
        Event.objects.filter(run=run, kind="eval", step=step, superseded=False)
        .order_by("-seq")
        .values_list("fields", flat=True)
    )
    eval_result = EvalResult(
        step=step,
        eval_loss=next((payload.get("eval_loss") for payload in losses), None),
        trainable_parameters=int(run.start_info.get("trainable_parameters") or 0),
    )
    try:
        return register_weights(run, source, eval_result, check_quota=True)
    except OSError as error:
        if (source / STATE_FILES[2]).is_file():
            raise
        raise Conflict(
            f"The checkpoint of step {step:,} was just replaced by a newer one.", field="step"
        ) from error


def register_weights(
    run: Run, source: Path, eval_result: EvalResult, *, check_quota: bool = False
) -> AdapterVersion:
    """Copy a folder of weights into a new version. The same weights of the same run and step are
    registered once. The space for a run's result was reserved at its launch.

    Raises:
        Conflict: with `check_quota`, a disk quota would be exceeded.
    """
    staging_folder = Path(tempfile.mkdtemp(prefix=".register-", dir=run.folder))
    try:
        # Copy before the transaction, which should be short
        shutil.copytree(
            source, staging_folder, ignore=shutil.ignore_patterns(*STATE_FILES), dirs_exist_ok=True
        )
        (staging_folder / CARD_FILE).write_text(build_card(run, eval_result))
        return create_version(run, staging_folder, eval_result, check_quota=check_quota)
    finally:
        shutil.rmtree(staging_folder, ignore_errors=True)


def create_version(
    run: Run, staging_folder: Path, eval_result: EvalResult, *, check_quota: bool
) -> AdapterVersion:
    """Create the version of a staged folder, which is then moved to the version's own folder."""
    files = build_file_manifest(staging_folder)
    digest = get_weights_digest(files)
    with transaction.atomic():
        User.objects.select_for_update().get(pk=run.owner_id)  # serializes version numbers
        existing: AdapterVersion | None = AdapterVersion.objects.filter(
            run=run, step=eval_result.step, sha256=digest
        ).first()
        if existing is not None and existing.folder.is_dir():
            return existing
        if check_quota:
            check_disk_quota(run.owner, run.team, count_bytes(files))
        version = existing or AdapterVersion(
            run=run,
            owner=run.owner,
            team=run.team,
            name=run.name,
            number=take_next_number(run.owner, run.name),
            base_model=run.base_model,
            data=run.data,
            parent=AdapterVersion.objects.filter(pk=run.start_version or 0).first(),
            method=run.method,
            step=eval_result.step,
            sha256=digest,
            exact_match=eval_result.exact_match,
            eval_loss=eval_result.eval_loss,
            trainable_parameters=eval_result.trainable_parameters,
        )
        version.files = files
        version.size_bytes = version.disk_bytes = count_bytes(files)
        version.provenance = build_provenance(run, eval_result.step)
        version.save()
        move_to_version_folder(version, staging_folder)
    return version


def move_to_version_folder(version: AdapterVersion, staging_folder: Path) -> None:
    """Rename the staged folder. Call this inside the transaction that creates the row, so that no
    row lacks its files.
    """
    version.folder.parent.mkdir(exist_ok=True)
    shutil.rmtree(version.folder, ignore_errors=True)
    staging_folder.rename(version.folder)


def take_next_number(owner: User, name: str) -> int:
    """Call this in a transaction that locks the owner's row."""
    counter, _ = VersionCounter.objects.get_or_create(owner=owner, name=name)
    counter.last_number += 1
    counter.save()
    return counter.last_number


def build_file_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """SHA-256 and size of every file. Each file is synced to disk."""
    files: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.iterdir()):
        files[path.name] = {"sha256": sha256_file(path), "bytes": path.stat().st_size}
        fsync_path(path)
    return files


def get_weights_digest(files: dict[str, dict[str, Any]]) -> str:
    return str(
        next(entry["sha256"] for name, entry in files.items() if name.endswith(".safetensors"))
    )


def count_bytes(files: dict[str, dict[str, Any]]) -> int:
    return sum(entry["bytes"] for entry in files.values())


def stream_zip(version: AdapterVersion) -> Iterator[bytes]:
    """Stream the adapter's files as an uncompressed zip: weights do not compress."""
    archive = ZipStream(compress_type=ZIP_STORED)
    for name in sorted(version.files):
        archive.add_path(version.folder / name, f"{file_stem(version)}/{name}")
    yield from archive
