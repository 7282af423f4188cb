"""The worker's part of an upload: its job is done by a child program, and the outcome written to its row."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

from django.conf import settings
from django.db import transaction
from django.db.models import Max

from training.child_environment import NETWORK, child_environment, follow_child
from training.datasets.build import Choices, build
from training.datasets.check import Source, check
from training.datasets.formats import Format, detect
from training.datasets.forms import Mapped, guess
from training.datasets.intake import SAMPLE_RECORDS, most_bytes, refuse_faulty, sample
from training.datasets.models import Dataset, DatasetVersion, Upload, UploadState
from training.datasets.records import records
from training.errors import UserError, one_line
from training.people.models import User


def work_on(upload_id: int) -> None:
    """Do the job that an upload waits for. A second call for the same one does nothing."""
    waiting = Upload.objects.filter(pk=upload_id, state=UploadState.WAITING)
    if not waiting.update(state=UploadState.WORKING, progress_words="starting"):
        return
    upload = Upload.objects.get(pk=upload_id)
    upload.folder.mkdir(parents=True, exist_ok=True)
    order = {
        "files": upload.files,
        "mapped": upload.mapped,
        "choices": upload.choices,
        "hub_id": upload.source.removeprefix("hub: "),
        "root": str(Path(settings.HOME) / "data"),
        "most_bytes": settings.DATASET_MAX_BYTES if upload.job == "fetch" else most_bytes(),
    }
    (upload.folder / "order.json").write_text(json.dumps(order))
    command = [sys.executable, "-m", "training.datasets.program", upload.job, str(upload.folder)]
    environment = child_environment(*(NETWORK if upload.job == "fetch" else ()))
    said: dict[str, Any] = {}
    for said in follow_child(command, upload.folder / "program.log", cwd=settings.BASE_DIR, environment=environment):
        if "words" in said:
            Upload.objects.filter(pk=upload.pk).update(progress_words=said["words"][:200])
    finish(upload, said)


def finish(upload: Upload, said: dict[str, Any]) -> None:
    """Store what the program said last."""
    upload.progress_words = ""
    try:
        if "error" in said:
            raise UserError(said["error"])
        if upload.job == "save":
            save_version(upload, said["built"])
        elif upload.job == "check":
            upload.report, upload.state = said["report"], UploadState.CHECKED
        else:
            upload.files = [{**f, "format": detect(upload.folder / f["file"], f["name"]).to_dict()} for f in said["files"]]
            upload.mapped = guess([r for _, r in sample(upload) if isinstance(r, dict)]).to_dict()
            upload.bytes = sum((upload.folder / f["file"]).stat().st_size for f in said["files"])
            upload.state = UploadState.DRAFT
    except UserError as error:
        upload.state, upload.error = UploadState.FAILED, error.message
    upload.save()


def save_version(upload: Upload, built: dict[str, Any]) -> None:
    """The version of what was built from an upload; the first one makes the data set, too."""
    with transaction.atomic():
        if upload.dataset is None:
            upload.dataset = Dataset.objects.create(owner=upload.owner, team=upload.team, name=upload.name, source=upload.source)
        version = new_version(upload.dataset, built, upload.report)
        version.upload, version.mapped, version.choices = upload, upload.mapped, upload.choices
        version.save()
        upload.state = UploadState.DONE
        upload.save()


def new_version(dataset: Dataset, built: dict[str, Any], report: dict[str, Any]) -> DatasetVersion:
    """The next version of a data set, not stored yet."""
    rows = built["rows"]
    return DatasetVersion(
        dataset=dataset,
        number=(dataset.versions.aggregate(last=Max("number"))["last"] or 0) + 1,
        digest=built["digest"],
        rows=sum(rows.values()),
        train_rows=rows["train"],
        heldout_rows=rows["heldout"],
        test_rows=rows["test"],
        left_out=report["problems"]["count"],
        report={**report, "dropped": built["dropped"], "leaks": built["leaks"]},
    )


def forget_dead_work() -> None:
    """At a worker's start nothing is under way: what claims to be died with the last worker and begins anew."""
    Upload.objects.filter(state=UploadState.WORKING).update(state=UploadState.WAITING)


def create_dataset(
    user: User, name: str, lines: Iterable[bytes], *, source: str, licence: str = "", leave_out: bool = False
) -> DatasetVersion:
    """Trusted JSON Lines (examples, demos) checked and stored at once, in this process.

    Raises:
        BadData: faulty rows, unless `leave_out` says to go on without them.
        UserError: too few rows are left.
    """
    with tempfile.TemporaryDirectory(dir=settings.HOME) as place:
        path = Path(place) / "0"
        with path.open("wb") as out:
            out.writelines(lines)
        form = Format("jsonl")
        found = [r for _, r in islice(records(path, form, most_bytes=most_bytes()), SAMPLE_RECORDS) if isinstance(r, dict)]
        mapped = guess(found)
        mapped = mapped if mapped.columns else Mapped("messages", {"messages": "messages"})
        report = check([Source(path, form)], mapped, Path(place), most_bytes=most_bytes(), tell=lambda _done, _words: None)
        if not leave_out:
            refuse_faulty(report)
        built = build(Path(place), Choices(), Path(settings.HOME) / "data")
    dataset = Dataset.objects.create(
        owner=user,
        team=user.first_team(),
        name=one_line(name)[:120] or "Data",
        source=one_line(source)[:200],
        licence=licence,
    )
    version = new_version(dataset, built, report)
    version.mapped = mapped.to_dict()
    version.save()
    return version
