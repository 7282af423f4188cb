"""Merge a version into its base model in the background."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from django.db import transaction
from django.db.models import F

from adapters.lanes import PROGRAMS
from adapters.models import AdapterVersion
from training.child_process import get_model_program_limits
from training.datasets.preview import sample_eval_prompts
from training.engine.files import measure_tree
from training.errors import Conflict
from training.jobs.kinds import JobKind
from training.jobs.models import Job, JobState
from training.jobs.runner import get_subject, run_program
from training.jobs.services import enqueue_job, find_busy_ids, get_job
from training.people.disk_quota import check_disk_quota, lock_quotas
from training.people.models import User

KIND = "merge"
NUM_PROMPTS, MIN_PROMPTS = 8, 4
# For versions with little or no held-out data
COMMON_PROMPTS = [
    [{"role": "user", "content": text}]
    for text in (
        "What can you do?",
        "Write a short greeting.",
        "turn on the kitchen lamp",
        "List the files of this folder.",
    )
]


def merge_version(user: User, version: AdapterVersion) -> Job:
    """Start a merge, or return the job that is running or done.

    Raises:
        Conflict: the method does not support merging, or a disk quota would be exceeded.
    """
    if version.method_spec.merge_unsupported_reason:
        raise Conflict(
            f"{version.method_spec.title} cannot be merged. "
            f"{version.method_spec.merge_unsupported_reason}",
            field="merge",
        )
    size = measure_tree(version.base_model.folder) + version.size_bytes
    return enqueue_export(user, KIND, str(version.pk), version, disk_bytes=size)


def enqueue_export(
    user: User,
    kind: str,
    key: str,
    version: AdapterVersion,
    *,
    disk_bytes: int,
    params: dict[str, Any] | None = None,
) -> Job:
    """Enqueue a job that writes `disk_bytes` for a version, unless it is running or done.

    Raises:
        Conflict: a disk quota would be exceeded.
    """
    with transaction.atomic():
        lock_quotas(version.owner, version.team)  # two clicks reserve once
        if not Job.objects.filter(kind=kind, key=key).exclude(state=JobState.FAILED).exists():
            check_disk_quota(version.owner, version.team, disk_bytes)
            AdapterVersion.objects.filter(pk=version.pk).update(
                disk_bytes=F("disk_bytes") + disk_bytes
            )
        return enqueue_job(user, kind, key, subjects=[version], params=params)


def update_version_disk_bytes(job: Job, _error: str = "") -> None:
    """Replace the reservations of a version when the last of its jobs has ended."""
    version = get_subject(job, AdapterVersion)
    assert version is not None
    if not find_busy_ids(AdapterVersion).filter(object_id=version.pk).exists():
        version.update_disk_bytes()


def save_export(job: Job, result: dict[str, Any]) -> None:
    Job.objects.filter(pk=job.pk).update(result=result)
    update_version_disk_bytes(job)


def get_merge_job(version: AdapterVersion) -> Job:
    """The merge of a version, whatever its state. Raises NotFound if none was started."""
    return get_job(KIND, str(version.pk))


def run_merge(job: Job) -> dict[str, Any]:
    version = get_subject(job, AdapterVersion, "base_model")
    assert version is not None
    params = {
        "base": str(version.base_model.folder),
        "adapter": str(version.folder),
        "method": version.method,
        "target": str(version.merged_folder),
        "prompts": get_parity_prompts(version),
    }
    limits = get_model_program_limits(measure_tree(version.base_model.folder) + version.size_bytes)
    return run_program(job, "adapters.programs.merge", params, limits=limits)


def merge_outputs(job: Job) -> list[Path]:
    """The merged model, and the temporary folders of a running merge."""
    version = get_subject(job, AdapterVersion)
    assert version is not None
    folder = version.merged_folder
    temporary_folders = [
        folder.with_name(f".{folder.name}.{suffix}") for suffix in ("merging", "unchecked")
    ]
    return [folder, *temporary_folders]


def get_parity_prompts(version: AdapterVersion) -> list[list[dict[str, str]]]:
    """Prompts for the parity check: held-out prompts of the version's data, filled up with common
    ones.
    """
    held_out_rows = sample_eval_prompts(version.data, NUM_PROMPTS) if version.data else []
    return [row["messages"] for row in held_out_rows] + COMMON_PROMPTS[
        : max(0, MIN_PROMPTS - len(held_out_rows))
    ]


def is_merged(version: AdapterVersion) -> bool:
    """Whether the merged model exists and has passed its check."""
    return (
        Job.objects.filter(kind=KIND, key=str(version.pk), state=JobState.DONE).exists()
        and version.merged_folder.is_dir()
    )


MERGE_JOB = JobKind(
    KIND,
    run_merge,
    lane=PROGRAMS,
    subjects=(AdapterVersion,),
    output_folders=merge_outputs,
    on_done=save_export,
    on_failed=update_version_disk_bytes,
)
