"""Uploads on their way to a data set: received, mapped, and handed to the worker to be checked and saved."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from django.conf import settings

from training.datasets.build import Choices
from training.datasets.formats import DELIMITERS, UNITS, BadFile, Format, detect
from training.datasets.forms import Mapped, guess
from training.datasets.hub import check_hub_id
from training.datasets.models import Dataset, Upload, UploadState
from training.datasets.records import Found, records
from training.errors import Conflict, UserError, one_line
from training.people.models import User

SAMPLE_RECORDS = 200
ALLOWED_UNPACKING = 4  # a gzip file may unpack to this many times the limit
Named = tuple[Path, str, str]  # a file, the name it came with, and the split it stands for


class BadData(UserError):
    """The file holds faulty rows; `report` counts, groups and names them."""

    def __init__(self, message: str, report: dict[str, Any]) -> None:
        super().__init__(message, field="file")
        self.report = report


def most_bytes() -> int:
    return int(settings.DATASET_MAX_BYTES) * ALLOWED_UNPACKING


def receive(user: User, files: Sequence[Named], *, name: str, source: str, dataset: Dataset | None = None) -> Upload:
    """Take over files that lie on disk (they are moved), tell their formats, and guess what their columns mean.

    Raises:
        BadFile: empty, binary or in another encoding; nothing is kept then.
    """
    described = [
        {"file": str(number), "name": one_line(called)[-100:], "split": split, "format": detect(path, called).to_dict()}
        for number, (path, called, split) in enumerate(files)
    ]
    upload = Upload.objects.create(
        owner=user,
        team=dataset.team if dataset else user.first_team(),
        dataset=dataset,
        name=one_line(name)[:120] or one_line(Path(files[0][1]).name.split(".")[0])[:120] or "Data",
        source=one_line(source)[:200],
        bytes=sum(path.stat().st_size for path, _, _ in files),
        files=described,
    )
    shutil.rmtree(upload.folder, ignore_errors=True)
    upload.folder.mkdir(parents=True)
    for number, (path, _, _) in enumerate(files):
        shutil.move(path, upload.folder / str(number))
    upload.mapped = guess([record for _, record in sample(upload) if isinstance(record, dict)]).to_dict()
    upload.save()
    return upload


def order_from_hub(user: User, hub_id: str, *, name: str) -> Upload:
    """Enter a data set of the hub; the worker fetches it.

    Raises:
        UserError: not a hub id.
    """
    source = f"hub: {check_hub_id(hub_id)}"
    return Upload.objects.create(
        owner=user,
        team=user.first_team(),
        name=one_line(name)[:120] or hub_id.rpartition("/")[2],
        source=source,
        state=UploadState.WAITING,
        job="fetch",
    )


def form_of(upload: Upload) -> Format:
    return Format(**upload.files[0]["format"])


def sample(upload: Upload, count: int = SAMPLE_RECORDS) -> list[Found]:
    """The first records. What ends the file early (cut-off gzip, damaged Parquet) ends the sample; the check names it."""
    found: list[Found] = []
    try:
        for record in islice(records(upload.folder / "0", form_of(upload), most_bytes=most_bytes()), count):
            found.append(record)
    except BadFile:
        if not found:
            raise
    return found


def set_mapping(upload: Upload, values: Mapping[str, Any], form: Mapping[str, Any]) -> Upload:
    """Another meaning of the columns, or another way to read the file; what was checked before counts no more.

    Raises:
        UserError: a needed column is not chosen.
        Conflict: the worker is at it.
    """
    mapped = Mapped.from_dict(values)
    if upload.state in (UploadState.WAITING, UploadState.WORKING):
        raise Conflict("The file is being read; wait until that is done.")
    read = form_of(upload)
    delimiter, unit = form.get("delimiter", read.delimiter), form.get("unit", read.unit)
    if delimiter not in DELIMITERS or unit not in UNITS:
        raise UserError(f"A row's parts are parted by one of {', '.join(DELIMITERS.values())}.", field="delimiter")
    changed = replace(read, delimiter=delimiter, unit=unit, header=bool(form.get("header", read.header)))
    files = [{**file, "format": changed.to_dict()} if file["format"]["kind"] == read.kind else file for file in upload.files]
    upload.files, upload.mapped = files, mapped.to_dict()
    upload.state, upload.report, upload.error = UploadState.DRAFT, {}, ""
    upload.save()
    return upload


def ask_for(upload: Upload, job: str, **changes: Any) -> None:
    """Leave a job for the worker.

    Raises:
        Conflict: there is one already, or a save without a check.
    """
    ready = [UploadState.CHECKED, UploadState.DONE] if job == "save" else [UploadState.DRAFT, UploadState.FAILED]
    waiting = {"state": UploadState.WAITING, "job": job, "error": "", "progress_words": "", **changes}
    if not Upload.objects.filter(pk=upload.pk, state__in=ready).update(**waiting):
        raise Conflict("Check the file first." if job == "save" else "The file is being read already, or has been.")
    upload.refresh_from_db()


def ask_for_save(upload: Upload, choices: Choices, *, leave_out: bool) -> None:
    """Save a checked upload as a version.

    Raises:
        BadData: faulty rows that nobody said may be left out.
    """
    if not leave_out:
        refuse_faulty(upload.report)
    ask_for(upload, "save", choices=choices.to_dict())


def refuse_faulty(report: dict[str, Any]) -> None:
    count = report["problems"]["count"] if report else 0
    if count:
        rows = f"{count:,} of {count + report['rows']:,} rows"
        raise BadData(f"{rows} cannot be used. Correct the file, or leave them out.", report)
