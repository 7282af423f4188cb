"""The background job that compares the weights of versions and the data they were trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import combinations
from typing import Any

from adapters.export import merge
from adapters.lanes import PROGRAMS
from adapters.models import AdapterVersion
from training.child_process import get_model_program_limits
from training.datasets.models import DatasetVersion
from training.engine.files import measure_tree
from training.jobs.kinds import JobKind
from training.jobs.models import Job, JobState
from training.jobs.runner import run_program, save_progress
from training.jobs.services import enqueue_job
from training.people.models import User

KIND = "weight_analysis"


def format_job_key(versions: Sequence[AdapterVersion]) -> str:
    return ",".join(str(pk) for pk in sorted(version.pk for version in versions))


def enqueue_analysis(
    user: User, versions: Sequence[AdapterVersion], *, retry_failed: bool = False
) -> Job:
    """The job that compares these versions, in any order: started now, running, or done before.
    `retry_failed` restarts a failed one.
    """
    params = {"versions": sorted(version.pk for version in versions)}
    restart = (JobState.FAILED,) if retry_failed else ()
    return enqueue_job(
        user, KIND, format_job_key(versions), subjects=versions, params=params, restart=restart
    )


def run_analysis(job: Job) -> dict[str, Any]:
    versions = list(
        AdapterVersion.objects.filter(pk__in=job.params["versions"]).select_related(
            "base_model", "data__dataset"
        )
    )
    save_progress(job, {"message": "comparing data"})
    data_overlaps = compute_data_overlaps(versions)
    with_data = next((version for version in versions if version.data), versions[0])
    params = {
        "members": [
            {
                "key": str(version.pk),
                "method": version.method,
                "base": str(version.base_model.folder),
                "folder": str(version.folder),
            }
            for version in versions
        ],
        "prompts": merge.get_parity_prompts(with_data),
    }
    folders = {version.base_model.folder for version in versions}
    size = sum(map(measure_tree, folders)) + sum(version.size_bytes for version in versions)
    limits = get_model_program_limits(size)
    result = run_program(job, "adapters.programs.weight_analysis", params, limits=limits)
    return {**result, "overlaps": data_overlaps}


def compute_data_overlaps(versions: Sequence[AdapterVersion]) -> list[dict[str, Any]]:
    """For each pair of different dataset versions: the training rows of each, and how many
    identical rows both contain.
    """
    data_by_id = {version.data.pk: version.data for version in versions if version.data}
    digests = (
        {pk: row_digests(data) for pk, data in data_by_id.items()} if len(data_by_id) > 1 else {}
    )
    return [
        {
            "first": str(data_by_id[one]),
            "second": str(data_by_id[other]),
            "first_rows": data_by_id[one].train_rows,
            "second_rows": data_by_id[other].train_rows,
            "shared": len(digests[one] & digests[other]),
        }
        for one, other in combinations(data_by_id, 2)
    ]


def row_digests(data: DatasetVersion) -> set[bytes]:
    """16 bytes per row, so that a million rows take at most 100 MB."""
    with data.split_path("train").open("rb") as file:
        return {hashlib.blake2b(line.strip(), digest_size=16).digest() for line in file}


WEIGHT_ANALYSIS_JOB = JobKind(KIND, run_analysis, lane=PROGRAMS, subjects=(AdapterVersion,))
