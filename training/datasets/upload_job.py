"""The worker's upload job: runs `program.py` and saves its result to the upload."""

from __future__ import annotations

import fcntl
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from django.conf import settings
from django.db import transaction
from django.db.models import Max

from training.child_process import (
    GIB,
    NETWORK_VARIABLES,
    Message,
    ProgramLimits,
    child_environment,
    module_command,
    write_params,
)
from training.datasets.build import BuildOptions, build_version
from training.datasets.check import Source, check_sources
from training.datasets.column_mapping import ColumnMapping
from training.datasets.formats import Format
from training.datasets.mapping_guess import guess_mapping
from training.datasets.models import Dataset, DatasetVersion, Upload, UploadState
from training.datasets.program import read_sample
from training.datasets.uploads import (
    BUSY_STATES,
    UPLOAD_KIND,
    apply_detection,
    build_params,
    check_no_faulty_rows,
    max_unpacked_bytes,
    max_written_bytes,
    reserve_download,
)
from training.errors import UserError, to_one_line
from training.jobs.kinds import JobKind, Lane
from training.jobs.models import Job
from training.jobs.runner import follow_program, get_subject, save_job
from training.people.disk_quota import check_disk_quota
from training.people.models import User
from training.people.permissions import check_changeable

MAX_CONCURRENT = 2  # uploads per worker at the same time; at most one per user
JOB_LIMITS = ProgramLimits(address_space_bytes=3 * GIB, counted_bytes=2 * GIB, cpu_seconds=3600)
MAX_SECONDS = 2 * 3600  # compared at every message; the program sends one every 5 s


def run_upload(job: Job) -> dict[str, Any]:
    """Run the job of an upload. Returns the fields of the program's messages by name."""
    upload = get_subject(job, Upload, "dataset", "owner")
    assert upload is not None
    update_upload(upload, state=UploadState.WORKING, progress_message="starting")
    try:
        return run_upload_program(job, upload)
    finally:
        if not Upload.objects.filter(pk=upload.pk).exists():  # discarded while it was processed
            shutil.rmtree(upload.folder, ignore_errors=True)


def run_upload_program(job: Job, upload: Upload) -> dict[str, Any]:
    """The fields of the program's messages by name. Cancelling the job kills the program."""
    if upload.job == "fetch":
        reserve_download(upload)
    write_params(upload.folder, build_params(upload))
    result: dict[str, Any] = {}
    deadline = time.monotonic() + MAX_SECONDS

    def store_message(message: Message) -> None:
        save_job(job)
        result.update(message)
        if "message" in message:
            update_upload(upload, progress_message=message["message"][:200])
        if time.monotonic() > deadline:
            raise UserError(f"Reading the file took more than {MAX_SECONDS // 3600} hours.")

    follow_program(
        job,
        module_command("training.datasets.program", upload.job, str(upload.folder)),
        upload.folder / "program.log",
        store_message,
        limits=replace(JOB_LIMITS, file_bytes=max_written_bytes()),
        environment=child_environment(*(NETWORK_VARIABLES if upload.job == "fetch" else ())),
    )
    return result


def update_upload(upload: Upload, **changes: Any) -> None:
    Upload.objects.filter(pk=upload.pk, state__in=BUSY_STATES).update(**changes)


def finish_upload(job: Job, result: dict[str, Any]) -> None:
    """Save the result of the job, in the transaction that ends it."""
    upload = get_subject(job, Upload, "dataset", "owner")
    assert upload is not None
    if upload.job == "save":
        save_version(upload, result["version"])
    elif upload.job == "check":
        # The version will be about as large as the checked rows
        size = max(upload.bytes, (upload.folder / "rows.jsonl").stat().st_size)
        changes = {"report": result["report"], "bytes": size, "progress_message": ""}
        update_upload(upload, state=UploadState.CHECKED, **changes)
    else:
        apply_detection(upload, result["detected"])
        size = sum((upload.folder / file["file"]).stat().st_size for file in upload.files)
        changes = {
            "files": upload.files,
            "mapping": upload.mapping,
            "bytes": size,
            "progress_message": "",
        }
        update_upload(upload, state=UploadState.DRAFT, **changes)
    upload.update_disk_bytes()


def record_failure(job: Job, error: str) -> None:
    Upload.objects.filter(pk=job.key, state__in=BUSY_STATES).update(
        state=UploadState.FAILED, error=error, progress_message=""
    )
    for upload in Upload.objects.filter(pk=job.key):
        upload.update_disk_bytes()


def save_version(upload: Upload, build_result: dict[str, Any]) -> None:
    """Save a new version from the result of a build; the first version also creates the dataset.

    Raises:
        NotAllowed: the uploader may no longer change the dataset.
        Conflict: the disk quota of the dataset's owner or team is exceeded.
    """
    update_upload(upload, state=UploadState.DONE, progress_message="")
    if upload.dataset is None:
        upload.dataset = Dataset.objects.create(
            owner=upload.owner, team=upload.team, name=upload.name, source=upload.source
        )
        Upload.objects.filter(pk=upload.pk).update(dataset=upload.dataset)
    check_changeable(upload.owner, upload.dataset)
    version = prepare_version(upload.dataset, build_result, upload.report)
    version.upload, version.mapping, version.build_options = (
        upload,
        upload.mapping,
        upload.build_options,
    )
    version.save()
    version.update_disk_bytes()
    dataset = upload.dataset
    if (dataset.owner_id, dataset.team_id) != (upload.owner_id, upload.team_id):
        # The upload's reservation counts for others
        check_disk_quota(dataset.owner, dataset.team, 0)


def prepare_version(
    dataset: Dataset, build_result: dict[str, Any], report: dict[str, Any]
) -> DatasetVersion:
    """The next version of a dataset, not saved yet. Inside a transaction it locks the dataset's
    row, so that version numbers are unique.
    """
    Dataset.objects.select_for_update().filter(pk=dataset.pk).first()
    rows = build_result["rows"]
    return DatasetVersion(
        dataset=dataset,
        number=(dataset.versions.aggregate(last=Max("number"))["last"] or 0) + 1,
        digest=build_result["digest"],
        rows=sum(rows.values()),
        train_rows=rows["train"],
        eval_rows=rows["eval"],
        test_rows=rows["test"],
        skipped_rows=report["problems"]["count"],
        report={**report, "dropped": build_result["dropped"], "leaks": build_result["leaks"]},
    )


@contextmanager
def lock_data_folder(*, exclusive: bool = False) -> Iterator[None]:
    """Lock the data folder: shared while versions are built, exclusive while folders are deleted.

    Raises:
        BlockingIOError: `exclusive`, and a version is being built.
    """
    root = Path(settings.HOME) / "data"
    root.mkdir(exist_ok=True)
    with (root / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB if exclusive else fcntl.LOCK_SH)
        yield


def lock_while_saving(job: Job) -> AbstractContextManager[None]:
    """The lock of the data folder, for a job that builds a version."""
    is_saving = Upload.objects.filter(pk=job.key, job="save").exists()
    return lock_data_folder() if is_saving else nullcontext()


def create_dataset(
    user: User,
    name: str,
    lines: Iterable[bytes],
    *,
    source: str,
    license: str = "",
    skip_faulty: bool = False,
) -> DatasetVersion:
    """Check and save trusted JSON Lines (examples, demos) at once, in this process.

    Raises:
        BadData: faulty rows, unless `skip_faulty` is set.
        UserError: fewer than two usable rows.
    """
    with tempfile.TemporaryDirectory(dir=settings.HOME) as folder, lock_data_folder():
        path = Path(folder) / "0"
        with path.open("wb") as out:
            out.writelines(lines)
        file_format = Format("jsonl")
        mapping = guess_mapping(
            [record for _, record, _ in read_sample(path, file_format) if record is not None]
        )
        mapping = (
            mapping if mapping.is_complete else ColumnMapping("messages", {"messages": "messages"})
        )
        report = check_sources(
            [Source(path, file_format)],
            mapping,
            Path(folder),
            max_bytes=max_unpacked_bytes(),
            report_progress=lambda _done, _message: None,
        )
        if not skip_faulty:
            check_no_faulty_rows(report)
        build_result = build_version(Path(folder), BuildOptions(), Path(settings.HOME) / "data")
        with transaction.atomic():
            dataset = Dataset.objects.create(
                owner=user,
                team=user.get_sharing_team(),
                name=to_one_line(name)[:120] or "Data",
                source=to_one_line(source)[:200],
                license=license,
            )
            version = prepare_version(dataset, build_result, report)
            version.mapping = mapping.to_dict()
            version.save()
            version.update_disk_bytes()
    return version


UPLOAD_JOB = JobKind(
    UPLOAD_KIND,
    run_upload,
    lane=Lane("uploads", size=MAX_CONCURRENT),
    subjects=(Upload,),
    max_tries=None,  # every worker restart counts as a try; the program has its own limits
    one_per_owner=True,
    guard=lock_while_saving,
    on_done=finish_upload,
    on_failed=record_failure,
    crash_message="The file could not be read ({error}).",
)
