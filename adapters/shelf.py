"""Put what a run left on the shelf, and hand it out again as a zip. It knows no torch."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

from django.db import transaction
from django.db.models import Max
from zipstream import ZIP_STORED, ZipStream

from adapters.card import NAME, card_of
from adapters.models import AdapterVersion
from training.engine.files import sha256, sync
from training.engine.outcome import Result
from training.runs.models import Run


def keep(run: Run, result: Result) -> None:
    """Copy the run's adapter to a new version. A worker that died half-way does it again to the same end."""
    source, aside = run.folder / "adapter", run.folder / ".shelf"
    shutil.rmtree(aside, ignore_errors=True)
    shutil.copytree(source, aside)  # outside the transaction: nobody waits for a large adapter's copy
    (aside / NAME).write_text(card_of(run, step=result.adapter_step or 0, heldout_loss=result.heldout_loss))
    files: dict[str, dict[str, Any]] = {}
    for path in sorted(aside.iterdir()):
        files[path.name] = {"sha256": sha256(path), "bytes": path.stat().st_size}
        sync(path)
    with transaction.atomic():
        version = AdapterVersion.objects.filter(run=run).first()
        if version is None:
            newest = AdapterVersion.objects.filter(owner=run.owner, name=run.name).aggregate(Max("number"))["number__max"] or 0
            version = AdapterVersion(run=run, owner=run.owner, team=run.team, name=run.name, number=newest + 1)
        version.base_model = run.base_model
        version.method = run.method
        version.step = result.adapter_step or 0
        version.exact_match = result.exact_match
        version.heldout_loss = result.heldout_loss
        version.trainable_parameters = result.trainable_parameters
        version.files = files
        version.size_bytes = sum(facts["bytes"] for facts in files.values())
        version.save()
        version.folder.parent.mkdir(exist_ok=True)
        shutil.rmtree(version.folder, ignore_errors=True)
        aside.rename(version.folder)  # inside it: no row names files that are not there


def zip_stream(version: AdapterVersion) -> Iterator[bytes]:
    """The adapter's files as a zip, made while it is sent. Stored, not packed: weights do not shrink."""
    archive = ZipStream(compress_type=ZIP_STORED)
    for name in sorted(version.files):
        archive.add_path(version.folder / name, f"{file_stem(version)}/{name}")
    yield from archive


def file_stem(version: AdapterVersion) -> str:
    """A name that is safe in a header and on every disk."""
    safe = "".join(c if c.isascii() and c.isalnum() else "-" for c in version.name).strip("-") or "adapter"
    return f"{safe}-v{version.number}"
