"""The worker's part of an upload: its job is done by a child program, and the outcome written to
its row, if that still waits.
"""

from __future__ import annotations

import fcntl
import json
import logging
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from django.conf import settings
from django.db import transaction
from django.db.models import Max
from django.utils import timezone

from training.child_environment import NETWORK, child_environment, follow_child
from training.datasets.build import Choices, build
from training.datasets.check import Source, check
from training.datasets.formats import Format
from training.datasets.forms import Mapped, guess
from training.datasets.intake import most_bytes, note_look, order_of, refuse_faulty
from training.datasets.models import Dataset, DatasetVersion, Upload, UploadState
from training.datasets.program import take_sample
from training.errors import UserError, one_line
from training.people.models import User
from training.people.visible import may_change

AT_ONCE = 2  # uploads that a worker reads at the same time; of one person only one
LOST_SECONDS = 60  # the program says something every 5 s
MOST_SECONDS = 2 * 3600
log = logging.getLogger("snapml.datasets")


def read_next() -> None:
    """Do what the longest waiting upload waits for, if there is one; a worker calls this over and
    over, in AT_ONCE threads.
    """
    take_up_lost()
    busy = Upload.objects.filter(state=UploadState.WORKING).values("owner")
    waiting = (
        Upload.objects.filter(state=UploadState.WAITING)
        .exclude(owner__in=busy)
        .order_by("pk")
        .first()
    )
    if waiting is not None:
        work_on(waiting.pk)


def take_up_lost() -> None:
    """An upload whose worker has said nothing for a minute waits again."""
    since = timezone.now() - timedelta(seconds=LOST_SECONDS)
    Upload.objects.filter(state=UploadState.WORKING, worked_at__lt=since).update(
        state=UploadState.WAITING
    )


def work_on(upload_id: int) -> None:
    """Do the job that an upload waits for. A second call for the same one does nothing."""
    waiting = Upload.objects.filter(pk=upload_id, state=UploadState.WAITING)
    if not waiting.update(
        state=UploadState.WORKING, progress_words="starting", worked_at=timezone.now()
    ):
        return
    upload = Upload.objects.select_related("dataset", "owner").get(pk=upload_id)
    try:
        with shared_data_folder():
            finish(upload, follow(upload))
    except UserError as error:
        write(upload, state=UploadState.FAILED, error=error.message, progress_words="")
    except Exception as error:
        log.exception("The work on upload %s failed.", upload_id)
        write(
            upload,
            state=UploadState.FAILED,
            error=f"It could not be read ({type(error).__name__}).",
            progress_words="",
        )
    if not Upload.objects.filter(pk=upload_id).exists():  # thrown away while it was read
        shutil.rmtree(upload.folder, ignore_errors=True)


def follow(upload: Upload) -> dict[str, Any]:
    """Run the program; returns what it said, by name. It is ended when nobody wants its work any
    more.
    """
    upload.folder.mkdir(parents=True, exist_ok=True)
    (upload.folder / "order.json").write_text(json.dumps(order_of(upload)))
    command = [sys.executable, "-m", "training.datasets.program", upload.job, str(upload.folder)]
    environment = child_environment(*(NETWORK if upload.job == "fetch" else ()))
    began = time.monotonic()
    said: dict[str, Any] = {}
    for words in follow_child(
        command, upload.folder / "program.log", cwd=settings.BASE_DIR, environment=environment
    ):
        said |= words
        changes = {"progress_words": words["words"][:200]} if "words" in words else {}
        if not write(upload, worked_at=timezone.now(), **changes):
            raise UserError("The upload was thrown away.")
        if time.monotonic() - began > MOST_SECONDS:
            raise UserError(f"Reading it took more than {MOST_SECONDS // 3600} hours.")
    if "error" in said:
        raise UserError(said["error"])
    return said


def write(upload: Upload, **changes: Any) -> int:
    """To the row, as long as it is this work's: 0 if it was thrown away or taken up by another
    worker.
    """
    return int(Upload.objects.filter(pk=upload.pk, state=UploadState.WORKING).update(**changes))


def finish(upload: Upload, said: dict[str, Any]) -> None:
    """Store what came of the job."""
    if upload.job == "save":
        save_version(upload, said["built"])
    elif upload.job == "check":
        write(upload, report=said["report"], state=UploadState.CHECKED, progress_words="")
    else:
        upload.files = said["files"]
        note_look(upload, said["looked"])
        size = sum((upload.folder / file["file"]).stat().st_size for file in upload.files)
        changes = {
            "files": upload.files,
            "mapped": upload.mapped,
            "bytes": size,
            "progress_words": "",
        }
        write(upload, state=UploadState.DRAFT, **changes)


def save_version(upload: Upload, built: dict[str, Any]) -> None:
    """The version of what was built from an upload; the first one makes the data set, too.

    Raises:
        NotAllowed: the data set is no longer the uploader's to change.
    """
    with transaction.atomic():
        if not write(upload, state=UploadState.DONE, progress_words=""):
            return
        if upload.dataset is None:
            upload.dataset = Dataset.objects.create(
                owner=upload.owner, team=upload.team, name=upload.name, source=upload.source
            )
            Upload.objects.filter(pk=upload.pk).update(dataset=upload.dataset)
        may_change(upload.owner, upload.dataset)
        version = new_version(upload.dataset, built, upload.report)
        version.upload, version.mapped, version.choices = upload, upload.mapped, upload.choices
        version.save()


def new_version(dataset: Dataset, built: dict[str, Any], report: dict[str, Any]) -> DatasetVersion:
    """The next version of a data set, not stored yet. Inside a transaction the data set's row is
    held, so numbers are unique.
    """
    Dataset.objects.select_for_update().filter(pk=dataset.pk).first()
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


@contextmanager
def shared_data_folder(*, alone: bool = False) -> Iterator[None]:
    """While versions are built nobody takes folders away: many build at once, who deletes is alone.

    Raises:
        BlockingIOError: `alone` is asked for while somebody builds.
    """
    root = Path(settings.HOME) / "data"
    root.mkdir(exist_ok=True)
    with (root / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB if alone else fcntl.LOCK_SH)
        yield


def create_dataset(
    user: User,
    name: str,
    lines: Iterable[bytes],
    *,
    source: str,
    licence: str = "",
    leave_out: bool = False,
) -> DatasetVersion:
    """Trusted JSON Lines (examples, demos) checked and stored at once, in this process.

    Raises:
        BadData: faulty rows, unless `leave_out` says to go on without them.
        UserError: too few rows are left.
    """
    with tempfile.TemporaryDirectory(dir=settings.HOME) as place, shared_data_folder():
        path = Path(place) / "0"
        with path.open("wb") as out:
            out.writelines(lines)
        form = Format("jsonl")
        mapped = guess([record for _, record, _ in take_sample(path, form) if record is not None])
        mapped = mapped if mapped.complete else Mapped("messages", {"messages": "messages"})
        report = check(
            [Source(path, form)],
            mapped,
            Path(place),
            most_bytes=most_bytes(),
            tell=lambda _done, _words: None,
        )
        if not leave_out:
            refuse_faulty(report)
        built = build(Path(place), Choices(), Path(settings.HOME) / "data")
        with transaction.atomic():
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
