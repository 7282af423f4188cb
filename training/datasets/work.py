"""The worker's part of an upload: its job is done by a child program, and the outcome written to
its row.
"""

from __future__ import annotations

import fcntl
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from django.conf import settings
from django.db import transaction
from django.db.models import Max

from training.child_process import (
    NETWORK_VARIABLES,
    Message,
    child_environment,
    module_command,
    write_params,
)
from training.datasets.build import Choices, build
from training.datasets.check import Source, check
from training.datasets.formats import Format
from training.datasets.forms import Mapped, guess
from training.datasets.intake import (
    BUSY,
    KIND,
    most_bytes,
    note_look,
    order_of,
    refuse_faulty,
)
from training.datasets.models import Dataset, DatasetVersion, Upload, UploadState
from training.datasets.program import take_sample
from training.errors import UserError, one_line
from training.jobs.kinds import JobKind, Lane
from training.jobs.models import Job
from training.jobs.runner import follow_program, get_subject, save_job
from training.people.models import User
from training.people.visible import check_changeable

AT_ONCE = 2  # uploads that a worker reads at the same time; of one person only one
MOST_SECONDS = 2 * 3600  # looked at with every message; the program sends one every 5 s


def run_upload(job: Job) -> dict[str, Any]:
    """Do what an upload waits for; returns what the program said, by name."""
    upload = get_subject(job, Upload, "dataset", "owner")
    assert upload is not None
    write(upload, state=UploadState.WORKING, progress_words="starting")
    try:
        return run_upload_program(job, upload)
    finally:
        if not Upload.objects.filter(pk=upload.pk).exists():  # thrown away while it was read
            shutil.rmtree(upload.folder, ignore_errors=True)


def run_upload_program(job: Job, upload: Upload) -> dict[str, Any]:
    """What the program said, by name. It is ended when nobody wants its work any more."""
    write_params(upload.folder, order_of(upload))
    result: dict[str, Any] = {}
    end = time.monotonic() + MOST_SECONDS

    def store(message: Message) -> None:
        save_job(job)
        result.update(message)
        if "message" in message:
            write(upload, progress_words=message["message"][:200])
        if time.monotonic() > end:
            raise UserError(f"Reading it took more than {MOST_SECONDS // 3600} hours.")

    follow_program(
        job,
        module_command("training.datasets.program", upload.job, str(upload.folder)),
        upload.folder / "program.log",
        store,
        environment=child_environment(*(NETWORK_VARIABLES if upload.job == "fetch" else ())),
    )
    return result


def write(upload: Upload, **changes: Any) -> None:
    Upload.objects.filter(pk=upload.pk, state__in=BUSY).update(**changes)


def finish(job: Job, result: dict[str, Any]) -> None:
    """Store what came of the job, in the transaction that ends it."""
    upload = get_subject(job, Upload, "dataset", "owner")
    assert upload is not None
    if upload.job == "save":
        save_version(upload, result["built"])
    elif upload.job == "check":
        write(upload, report=result["report"], state=UploadState.CHECKED, progress_words="")
    else:
        upload.files = result["files"]
        note_look(upload, result["looked"])
        size = sum((upload.folder / file["file"]).stat().st_size for file in upload.files)
        changes = {
            "files": upload.files,
            "mapped": upload.mapped,
            "bytes": size,
            "progress_words": "",
        }
        write(upload, state=UploadState.DRAFT, **changes)


def note_failed(job: Job, error: str) -> None:
    Upload.objects.filter(pk=job.key, state__in=BUSY).update(
        state=UploadState.FAILED, error=error, progress_words=""
    )


def save_version(upload: Upload, built: dict[str, Any]) -> None:
    """The version of what was built from an upload; the first one makes the data set, too.

    Raises:
        NotAllowed: the data set is no longer the uploader's to change.
    """
    write(upload, state=UploadState.DONE, progress_words="")
    if upload.dataset is None:
        upload.dataset = Dataset.objects.create(
            owner=upload.owner, team=upload.team, name=upload.name, source=upload.source
        )
        Upload.objects.filter(pk=upload.pk).update(dataset=upload.dataset)
    check_changeable(upload.owner, upload.dataset)
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
                team=user.get_sharing_team(),
                name=one_line(name)[:120] or "Data",
                source=one_line(source)[:200],
                licence=licence,
            )
            version = new_version(dataset, built, report)
            version.mapped = mapped.to_dict()
            version.save()
    return version


UPLOAD_JOB = JobKind(
    KIND,
    run_upload,
    lane=Lane("uploads", size=AT_ONCE),
    subjects=(Upload,),
    max_tries=None,  # each worker that is restarted counts; the program has limits of its own
    one_per_owner=True,
    guard=shared_data_folder,
    on_done=finish,
    on_failed=note_failed,
    crash_message="It could not be read ({error}).",
)
