"""Uploads on their way to a data set: received, looked at, mapped, and handed to the worker to be
checked and saved.

No file is read in this process: `program.py` does it, and leaves the first records in
`sample.json`.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from django.conf import settings
from django.db import transaction

from training.child_process import read_messages, run_child, write_params
from training.datasets.build import Choices
from training.datasets.formats import DELIMITERS, UNITS, BadFile, Format
from training.datasets.forms import Mapped
from training.datasets.hub import check_hub_id
from training.datasets.models import Dataset, Upload, UploadState
from training.errors import Conflict, UserError, one_line
from training.jobs.models import JobState
from training.jobs.services import enqueue_job
from training.people.models import User
from training.people.visible import check_changeable

KIND = "upload"
LOOK_SECONDS = 40  # the program's own limit is 20 s of CPU
# A gzip file may unpack to this many times the limit, and no more may be written of it
ALLOWED_UNPACKING = 4
BUSY = (UploadState.WAITING, UploadState.WORKING)
Named = tuple[Path, str, str]  # a file, the name it came with, and the split it stands for


class BadData(UserError):
    """The file holds faulty rows; `report` counts, groups and names them."""

    def __init__(self, message: str, report: dict[str, Any]) -> None:
        super().__init__(message, field="file")
        self.report = report


def most_bytes() -> int:
    return int(settings.DATASET_MAX_BYTES) * ALLOWED_UNPACKING


def receive(
    user: User, files: Sequence[Named], *, name: str, source: str, dataset: Dataset | None = None
) -> Upload:
    """Take over files that lie on disk (they are moved), tell their formats, and guess what their
    columns mean.

    Raises:
        BadFile: empty, binary or in another encoding; nothing is kept then.
        UserError: the disk has no room for it.
    """
    size = sum(path.stat().st_size for path, _, _ in files)
    if shutil.disk_usage(settings.HOME).free < 3 * size:
        raise UserError(
            "The server's disk has no room for this data; ask an admin to free some.", field="file"
        )
    upload = Upload.objects.create(
        owner=user,
        team=dataset.team if dataset else user.get_sharing_team(),
        dataset=dataset,
        name=one_line(name)[:120] or one_line(Path(files[0][1]).name.split(".")[0])[:120] or "Data",
        source=one_line(source)[:200],
        bytes=size,
        files=[
            {"file": str(number), "name": one_line(called)[-100:], "split": split}
            for number, (_, called, split) in enumerate(files)
        ],
    )
    shutil.rmtree(upload.folder, ignore_errors=True)
    upload.folder.mkdir(parents=True)
    for number, (path, _, _) in enumerate(files):
        shutil.move(path, upload.folder / str(number))
    try:
        look(upload)
    except UserError:
        shutil.rmtree(upload.folder, ignore_errors=True)
        upload.delete()
        raise
    upload.save()
    return upload


def order_of(upload: Upload) -> dict[str, Any]:
    """What the program is told."""
    return {
        "files": upload.files,
        "mapped": upload.mapped,
        "choices": upload.choices,
        "hub_id": upload.source.removeprefix("hub: "),
        "root": str(Path(settings.HOME) / "data"),
        "most_bytes": settings.DATASET_MAX_BYTES if upload.job == "fetch" else most_bytes(),
        "most_written": most_bytes() + 2**28,
    }


def look(upload: Upload) -> None:
    """Let the program look at the files, and note what it saw. The row is not saved.

    Raises:
        BadFile: what is wrong with the file.
    """
    write_params(upload.folder, order_of(upload))
    try:
        done = run_child(
            "training.datasets.program",
            "look",
            str(upload.folder),
            cwd=settings.BASE_DIR,
            seconds=LOOK_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        raise BadFile("The first rows of this file take too long to read.", field="file") from error
    messages = read_messages(done.stdout)
    last = next((one for one in reversed(messages) if "looked" in one or "error" in one), None)
    if last is None:
        raise BadFile(
            "The first rows of this file take too long or too much memory to read.", field="file"
        )
    if "error" in last:
        raise BadFile(last["error"], field=last["field"])
    note_look(upload, last["looked"])


def note_look(upload: Upload, looked: dict[str, Any]) -> None:
    upload.files = [
        {**file, "format": form} for file, form in zip(upload.files, looked["formats"], strict=True)
    ]
    upload.mapped = looked["mapped"]


def order_from_hub(user: User, hub_id: str, *, name: str, dataset: Dataset | None = None) -> Upload:
    """Enter a data set of the hub; the worker fetches it.

    Raises:
        UserError: not a hub id.
    """
    source = f"hub: {check_hub_id(hub_id)}"
    with transaction.atomic():
        upload = Upload.objects.create(
            owner=user,
            team=dataset.team if dataset else user.get_sharing_team(),
            dataset=dataset,
            name=one_line(name)[:120] or hub_id.rpartition("/")[2],
            source=source,
            state=UploadState.WAITING,
            job="fetch",
        )
        enqueue_upload(upload)
    return upload


def enqueue_upload(upload: Upload) -> None:
    restart = (JobState.DONE, JobState.FAILED)
    enqueue_job(upload.owner, KIND, str(upload.pk), subjects=[upload], restart=restart)


def form_of(upload: Upload) -> Format:
    """Raises Conflict: nobody has looked at the files yet."""
    if not upload.files or "format" not in upload.files[0]:
        raise Conflict("The files of this upload have not arrived.")
    return Format(**upload.files[0]["format"])


def sample(upload: Upload) -> list[tuple[int, dict[str, Any] | None, str]]:
    """The first records: (line, record, or what is wrong with it)."""
    path = upload.folder / "sample.json"
    return [tuple(one) for one in json.loads(path.read_text())] if path.is_file() else []


def column_names(upload: Upload) -> list[str]:
    """The names that occur in the sample, in order."""
    return list(
        dict.fromkeys(
            str(name) for _, record, _ in sample(upload) if record is not None for name in record
        )
    )


def set_mapping(upload: Upload, values: Mapping[str, Any]) -> Upload:
    """Another meaning of the columns; what was checked before counts no more.

    Raises:
        UserError: a needed column is not chosen.
        Conflict: the worker is at it.
    """
    form_of(upload)
    put_back(upload, mapped=Mapped.from_dict(values).to_dict())
    return upload


def set_reading(upload: Upload, form: Mapping[str, Any]) -> Upload:
    """Another way to read the file (delimiter, header, unit of text); the columns are guessed anew.

    Raises:
        UserError: no such way.
        Conflict: the worker is at it.
    """
    read = form_of(upload)
    delimiter, unit = form.get("delimiter", read.delimiter), form.get("unit", read.unit)
    if delimiter not in DELIMITERS or unit not in UNITS:
        raise UserError(
            f"Columns are parted by one of {', '.join(DELIMITERS.values())}.", field="delimiter"
        )
    if upload.state in BUSY:
        raise Conflict("The file is being read; wait until that is done.")
    changed = {
        **read.to_dict(),
        "delimiter": delimiter,
        "unit": unit,
        "header": bool(form.get("header", read.header)),
    }
    upload.files = [
        {**file, "format": changed} if file["format"]["kind"] == read.kind else file
        for file in upload.files
    ]
    look(upload)
    put_back(upload, files=upload.files, mapped=upload.mapped)
    return upload


def put_back(upload: Upload, **changes: Any) -> None:
    """To the mapping, with changes; by condition, since a worker may take the upload in this very
    moment.
    """
    changes |= {"state": UploadState.DRAFT, "report": {}, "error": ""}
    if not Upload.objects.filter(pk=upload.pk).exclude(state__in=BUSY).update(**changes):
        raise Conflict("The file is being read; wait until that is done.")
    upload.refresh_from_db()


def ask_for(upload: Upload, job: str, **changes: Any) -> None:
    """Leave a job for the worker.

    Raises:
        Conflict: there is one already, or a save without a check.
    """
    ready = [UploadState.CHECKED] if job == "save" else [UploadState.DRAFT, UploadState.FAILED]
    waiting = {
        "state": UploadState.WAITING,
        "job": job,
        "error": "",
        "progress_words": "",
        **changes,
    }
    with transaction.atomic():
        if not Upload.objects.filter(pk=upload.pk, state__in=ready).update(**waiting):
            raise Conflict(
                "Check the file first."
                if job == "save"
                else "The file is being read already, or has been."
            )
        enqueue_upload(upload)
    upload.refresh_from_db()


def ask_for_check(upload: Upload) -> None:
    """Raises Conflict: there is nothing to check yet; UserError: a needed column is not chosen."""
    form_of(upload)
    Mapped.from_dict(upload.mapped)
    ask_for(upload, "check")


def ask_for_save(upload: Upload, choices: Choices, *, leave_out: bool) -> None:
    """Save a checked upload as a version.

    Raises:
        BadData: faulty rows that nobody said may be left out.
        NotAllowed: its data set is no longer its owner's to change.
    """
    if upload.dataset is not None:
        check_changeable(upload.owner, upload.dataset)
    if not leave_out:
        refuse_faulty(upload.report)
    ask_for(upload, "save", choices=choices.to_dict())


def refuse_faulty(report: dict[str, Any]) -> None:
    problems = report["problems"] if report else {"count": 0}
    if problems["count"]:
        rows = f"{problems['count']:,} of {problems['count'] + report['rows']:,} rows"
        unread = " The file could not be read to its end." if problems.get("unread") else ""
        raise BadData(
            f"{rows} cannot be used.{unread} Correct the file, or leave them out.", report
        )
