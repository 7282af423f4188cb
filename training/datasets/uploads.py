"""Services for uploads: receive files, detect their formats, map the columns, and enqueue checks
and saves.

No file is read in this process. `program.py` reads them and writes the first records to
`sample.json`.
"""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from django.conf import settings
from django.db import transaction

from training.child_process import (
    GIB,
    ProgramLimits,
    build_error,
    read_messages,
    run_child,
    write_params,
)
from training.datasets.build import BuildOptions
from training.datasets.column_mapping import ColumnMapping, is_valid_column_name
from training.datasets.errors import BadFile
from training.datasets.formats import DELIMITERS, UNITS, Format
from training.datasets.hub import check_hub_id
from training.datasets.models import Dataset, Upload, UploadState
from training.errors import Conflict, NotFound, UserError, to_one_line
from training.jobs.models import JobState
from training.jobs.services import enqueue_job
from training.people.current_user import hold_program_slot
from training.people.disk_quota import check_disk_quota, get_free_bytes, lock_quotas
from training.people.models import User
from training.people.permissions import check_changeable

UPLOAD_KIND = "upload"
log = logging.getLogger("snapml.datasets")
DETECTION_TIMEOUT = 40
DETECTION_LIMITS = ProgramLimits(address_space_bytes=2 * GIB, counted_bytes=GIB, cpu_seconds=20)
# Size limit of an unpacked gzip file and of the files written, as a multiple of the upload limit
MAX_UNPACK_RATIO = 4
DISK_FACTOR = 3  # an upload is stored as it came, as checked rows and as a version
GUESS_NOTE = "The names of the columns do not tell which ones hold the prompt and the answer."
BUSY_STATES = (UploadState.WAITING, UploadState.WORKING)
NamedFile = tuple[Path, str, str]  # path, original name, split of all its rows


class BadData(UserError):
    """The upload has faulty rows; `report` counts, groups and lists them."""

    def __init__(self, message: str, report: dict[str, Any]) -> None:
        super().__init__(message, field="file", code="invalid_rows")
        self.report = report


def max_unpacked_bytes() -> int:
    return int(settings.DATASET_MAX_BYTES) * MAX_UNPACK_RATIO


def max_written_bytes() -> int:
    """Size limit of a file that is written while an upload is read."""
    return max_unpacked_bytes() + 2**28


def receive_files(
    user: User,
    files: Sequence[NamedFile],
    *,
    name: str,
    source: str,
    dataset: Dataset | None = None,
) -> Upload:
    """Move files into a new upload, detect their formats and guess the column mapping.

    Raises:
        BadFile: empty, binary or not UTF-8.
        UserError: not enough disk space.
        Conflict: a disk quota would be exceeded.
        OSError: for example a full disk. In each case nothing is saved.
    """
    try:
        upload = create_upload(user, files, name=name, source=source, dataset=dataset)
        store_files(upload, files)
    except (UserError, OSError):
        for path, _, _ in files:
            path.unlink(missing_ok=True)
        raise
    return upload


def create_upload(
    user: User, files: Sequence[NamedFile], *, name: str, source: str, dataset: Dataset | None
) -> Upload:
    """Raises UserError: not enough disk space. Conflict: a disk quota would be exceeded."""
    size = sum(path.stat().st_size for path, _, _ in files)
    if shutil.disk_usage(settings.HOME).free < DISK_FACTOR * size:
        raise UserError(
            "The server has not enough free disk space for this upload. Ask an admin to free some.",
            field="file",
        )
    title = to_one_line(name)[:120] or to_one_line(Path(files[0][1]).name.split(".")[0])[:120]
    team = dataset.team if dataset else user.get_sharing_team()
    with transaction.atomic():
        check_disk_quota(user, team, DISK_FACTOR * size)
        return Upload.objects.create(
            owner=user,
            team=team,
            dataset=dataset,
            name=title or "Data",
            source=to_one_line(source)[:200],
            bytes=size,
            disk_bytes=size,
            files=[
                {"file": str(number), "name": to_one_line(file_name)[-100:], "split": split}
                for number, (_, file_name, split) in enumerate(files)
            ],
        )


def store_files(upload: Upload, files: Sequence[NamedFile]) -> None:
    """Move the files into the upload's folder and detect their formats. If that fails, the upload
    is deleted.
    """
    shutil.rmtree(upload.folder, ignore_errors=True)
    try:
        upload.folder.mkdir(parents=True)
        for number, (path, _, _) in enumerate(files):
            shutil.move(path, upload.folder / str(number))
        run_detection(upload)
    except (UserError, OSError):
        shutil.rmtree(upload.folder, ignore_errors=True)
        upload.delete()
        raise
    upload.bytes = sum((upload.folder / file["file"]).stat().st_size for file in upload.files)
    upload.disk_bytes = upload.measure_disk_bytes()
    fields = {name: getattr(upload, name) for name in ("files", "mapping", "bytes", "disk_bytes")}
    if not Upload.objects.filter(pk=upload.pk).update(**fields):
        shutil.rmtree(upload.folder, ignore_errors=True)
        raise NotFound("The upload was discarded while its first rows were read.", field="file")


def reserve_download(upload: Upload) -> None:
    """Reserve the disk space for the largest download that the quotas allow: its size is not known
    yet.
    """
    with transaction.atomic():
        lock_quotas(upload.owner, upload.team)
        Upload.objects.filter(pk=upload.pk).update(disk_bytes=0)  # of an earlier try
        free = get_free_bytes(upload.owner, upload.team)
        limit = DISK_FACTOR * int(settings.DATASET_MAX_BYTES)
        upload.disk_bytes = limit if free is None else min(limit, free)
        Upload.objects.filter(pk=upload.pk).update(disk_bytes=upload.disk_bytes)


def get_max_bytes(upload: Upload) -> int:
    """How many bytes a step of reading an upload may write: a small file may unpack to gigabytes.
    The upload's own space is free for it.
    """
    if upload.job == "fetch":
        return upload.disk_bytes // DISK_FACTOR
    free = get_free_bytes(upload.owner, upload.team)
    limit = max_unpacked_bytes()
    return limit if free is None else min(limit, (free + upload.disk_bytes) // DISK_FACTOR)


def build_params(upload: Upload) -> dict[str, Any]:
    """The parameters of `program.py`."""
    return {
        "files": upload.files,
        "mapping": upload.mapping,
        "build_options": upload.build_options,
        "hub_id": upload.source.removeprefix("hub: "),
        "root": str(Path(settings.HOME) / "data"),
        "max_bytes": get_max_bytes(upload),
    }


def run_detection(upload: Upload) -> None:
    """Run the program's `detect` action and apply its result. The upload is not saved.

    Raises:
        BadFile: what is wrong with the file.
    """
    write_params(upload.folder, build_params(upload))
    try:
        with hold_program_slot(DETECTION_LIMITS.counted_bytes):
            result = run_child(
                "training.datasets.program",
                "detect",
                str(upload.folder),
                cwd=settings.BASE_DIR,
                seconds=DETECTION_TIMEOUT,
                limits=replace(DETECTION_LIMITS, file_bytes=max_written_bytes()),
            )
    except subprocess.TimeoutExpired as error:
        raise BadFile(
            "Reading the first rows of this file takes too long.", field="file"
        ) from error
    messages = read_messages(result.stdout)
    outcome = next(
        (message for message in reversed(messages) if "detected" in message or "error" in message),
        None,
    )
    if outcome is None:
        log.error("Detection exited with code %s: %s", result.returncode, result.stderr[-2000:])
        raise BadFile(
            "Reading the first rows of this file takes too long or too much memory.", field="file"
        )
    if "error" in outcome:
        problem = build_error(outcome)
        if problem.status != BadFile.status:
            raise problem
        raise BadFile(problem.message, field=problem.field, code=problem.code)
    apply_detection(upload, outcome["detected"])


def apply_detection(upload: Upload, detection: dict[str, Any]) -> None:
    upload.files, upload.mapping = detection["files"], detection["mapping"]


def enqueue_hub_fetch(
    user: User, hub_id: str, *, name: str, dataset: Dataset | None = None
) -> Upload:
    """Create an upload of a Hugging Face dataset, which the worker downloads.

    Raises:
        UserError: not a Hub id.
    """
    source = f"hub: {check_hub_id(hub_id)}"
    with transaction.atomic():
        upload = Upload.objects.create(
            owner=user,
            team=dataset.team if dataset else user.get_sharing_team(),
            dataset=dataset,
            name=to_one_line(name)[:120] or hub_id.rpartition("/")[2],
            source=source,
            state=UploadState.WAITING,
            job="fetch",
        )
        enqueue_upload(upload)
    return upload


def enqueue_upload(upload: Upload) -> None:
    """Enqueue the upload's job and reserve the disk space that it may need. Call it in the
    transaction that changes the upload.

    Raises:
        Conflict: a disk quota would be exceeded.
    """
    disk_bytes = max(upload.disk_bytes, DISK_FACTOR * upload.bytes)
    check_disk_quota(upload.owner, upload.team, disk_bytes - upload.disk_bytes)
    Upload.objects.filter(pk=upload.pk).update(disk_bytes=disk_bytes)
    restart = (JobState.DONE, JobState.FAILED)
    enqueue_job(upload.owner, UPLOAD_KIND, str(upload.pk), subjects=[upload], restart=restart)


def get_file_format(upload: Upload) -> Format:
    """The format of the first file.

    Raises:
        Conflict: the files have not been downloaded yet.
    """
    if not upload.files or "format" not in upload.files[0]:
        raise Conflict("The files of this upload have not been downloaded yet.")
    return Format(**upload.files[0]["format"])


def load_sample(upload: Upload) -> list[tuple[int, dict[str, Any] | None, str]]:
    """The first records, as (line, record, problem)."""
    path = upload.folder / "sample.json"
    return [tuple(item) for item in json.loads(path.read_text())] if path.is_file() else []


def list_column_names(upload: Upload) -> list[str]:
    """The column names of the sample that can be chosen, in order of appearance."""
    names = (name for _, record, _ in load_sample(upload) if record is not None for name in record)
    return [name for name in dict.fromkeys(names) if is_valid_column_name(name)]


def set_mapping(upload: Upload, values: Mapping[str, Any]) -> Upload:
    """Set the column mapping. The results of earlier checks are discarded.

    Raises:
        UserError: a required column is missing.
        Conflict: the worker is processing the upload.
    """
    get_file_format(upload)
    reset_to_mapping(upload, mapping=ColumnMapping.from_dict(values).to_dict())
    return upload


def set_read_options(upload: Upload, options: Mapping[str, Any]) -> Upload:
    """Change how the file is read (delimiter, header, unit of plain text) and guess the mapping
    again.

    Raises:
        UserError: unknown option.
        Conflict: the worker is processing the upload.
    """
    current_format = get_file_format(upload)
    delimiter, unit = (
        options.get("delimiter", current_format.delimiter),
        options.get("unit", current_format.unit),
    )
    if delimiter not in DELIMITERS:
        raise UserError(
            f"The delimiter must be one of {', '.join(DELIMITERS.values())}.", field="delimiter"
        )
    if unit not in UNITS:
        raise UserError(f"The unit must be one of {', '.join(UNITS)}.", field="unit")
    if upload.state in BUSY_STATES:
        raise Conflict("The upload is being processed. Wait until it is done.", code="busy")
    new_format = {
        **current_format.to_dict(),
        "delimiter": delimiter,
        "unit": unit,
        "header": bool(options.get("header", current_format.header)),
    }
    upload.files = [
        {**file, "format": new_format} if file["format"]["kind"] == current_format.kind else file
        for file in upload.files
    ]
    run_detection(upload)
    reset_to_mapping(upload, files=upload.files, mapping=upload.mapping)
    return upload


def reset_to_mapping(upload: Upload, **changes: Any) -> None:
    """Save the changes and set the state back to mapping. The update is conditional, since a worker
    may start the upload at the same time.
    """
    changes |= {"state": UploadState.DRAFT, "report": {}, "error": ""}
    if not Upload.objects.filter(pk=upload.pk).exclude(state__in=BUSY_STATES).update(**changes):
        raise Conflict("The upload is being processed. Wait until it is done.", code="busy")
    upload.refresh_from_db()


def request_job(upload: Upload, job: str, **changes: Any) -> None:
    """Enqueue a job for the worker.

    Raises:
        Conflict: a job is already running, or a save without a check.
    """
    allowed_states = (
        [UploadState.CHECKED] if job == "save" else [UploadState.DRAFT, UploadState.FAILED]
    )
    updates = {
        "state": UploadState.WAITING,
        "job": job,
        "error": "",
        "progress_message": "",
        **changes,
    }
    with transaction.atomic():
        if not Upload.objects.filter(pk=upload.pk, state__in=allowed_states).update(**updates):
            if job == "save":
                raise Conflict("Check the file first.", code="not_checked")
            raise Conflict(
                "The upload is already being processed or checked.", code="already_enqueued"
            )
        enqueue_upload(upload)
    upload.refresh_from_db()


def request_check(upload: Upload) -> None:
    """Enqueue a check.

    Raises:
        Conflict: the mapping is a guess that nobody confirmed, the files have not been downloaded
            yet, or a job is already running.
        UserError: a required column is missing.
    """
    get_file_format(upload)
    mapping = ColumnMapping.from_dict(upload.mapping)
    if not mapping.is_certain:
        raise Conflict(
            f"The column mapping is a guess. {mapping.note or GUESS_NOTE} Confirm or correct it "
            "with PATCH.",
            field="row_format",
            code="uncertain_mapping",
        )
    request_job(upload, "check")


def request_save(upload: Upload, options: BuildOptions, *, skip_faulty: bool) -> None:
    """Enqueue a save of a checked upload as a new version.

    Raises:
        BadData: faulty rows, and `skip_faulty` is not set.
        NotAllowed: the owner of the upload may no longer change its dataset.
    """
    if upload.dataset is not None:
        check_changeable(upload.owner, upload.dataset)
    if not skip_faulty:
        check_no_faulty_rows(upload.report)
    request_job(upload, "save", build_options=options.to_dict())


def check_no_faulty_rows(report: dict[str, Any]) -> None:
    problems = report["problems"] if report else {"count": 0}
    if problems["count"]:
        rows = f"{problems['count']:,} of {problems['count'] + report['rows']:,}"
        unread = " The end of the file could not be read." if problems.get("unread_after") else ""
        raise BadData(
            f"Invalid rows: {rows}.{unread} Fix the file, or save without these rows.", report
        )
