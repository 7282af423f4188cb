"""What leaves the house: the merged model and GGUF files, made in the background and handed out. It
knows no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from zipstream import ZIP_STORED, ZipStream

from adapters.export import merge
from adapters.lanes import PROGRAMS
from adapters.models import AdapterVersion, file_stem
from training.errors import Conflict, NotFound, UserError
from training.jobs.kinds import JobKind
from training.jobs.models import Job, JobState
from training.jobs.runner import get_subject, run_program
from training.jobs.services import enqueue_job
from training.people.models import User

KIND = "gguf"
# What the `gguf` package can pack; K-quants it cannot. The words say what each costs.
QUANTIZATIONS = {
    "f16": "16 bits: half the size of f32, answers the same",
    "q8_0": "8 bits: a quarter, hardly worse",
    "q4_1": "4 bits with an offset: an eighth, noticeably worse",
    "q4_0": "4 bits: the smallest, worst",
    "bf16": "16 bits as trained; llama.cpp rounds more than with f16",
    "f32": "32 bits: the largest, exact",
}


def export_gguf(user: User, version: AdapterVersion, quantization: str) -> Job:
    """Begin to write a GGUF file of a version's whole model, or tell of the one that is under way
    or done.

    Raises:
        UserError: no such quantization. Conflict: it has no whole model, and why or what to do.
    """
    if quantization not in QUANTIZATIONS:
        raise UserError(
            f"quantization must be one of {', '.join(QUANTIZATIONS)}.", field="quantization"
        )
    get_model_folder(version)
    params = {"quantization": quantization}
    return enqueue_job(
        user, KIND, f"{version.pk}:{quantization}", subjects=[version], params=params
    )


def get_model_folder(version: AdapterVersion) -> Path:
    """Where the whole model lies. Raises Conflict: there is none (yet)."""
    if version.is_full_model:
        return version.folder
    if version.method_spec.merge_unsupported_reason:
        raise Conflict(
            f"{version.method_spec.title} has no whole model to export: "
            f"{version.method_spec.merge_unsupported_reason} Download the adapter."
        )
    if not merge.is_merged(version):
        raise Conflict(
            "Merge this version into its base first; what is exported is the merged model."
        )
    return version.merged_folder


def run_gguf(job: Job) -> dict[str, Any]:
    version = get_subject(job, AdapterVersion, "base_model")
    assert version is not None
    quantization = job.params["quantization"]
    params = {
        "model": str(get_model_folder(version)),
        "target": str(gguf_path(version, quantization)),
        "quantization": quantization,
        "prompts": merge.get_parity_prompts(version),
    }
    return run_program(job, "adapters.programs.gguf_export", params)


def gguf_outputs(job: Job) -> list[Path]:
    version = get_subject(job, AdapterVersion)
    assert version is not None
    return [gguf_path(version, job.params["quantization"]).parent]


def gguf_path(version: AdapterVersion, quantization: str) -> Path:
    return version.merged_folder.parent / f"{version.pk}-gguf" / f"{quantization}.gguf"


def get_gguf(version: AdapterVersion, quantization: str) -> Path:
    """The file, whole and checked. Raises NotFound: it has not been made."""
    is_done = Job.objects.filter(
        kind=KIND, key=f"{version.pk}:{quantization}", state=JobState.DONE
    ).exists()
    path = gguf_path(version, quantization) if quantization in QUANTIZATIONS else None
    if not is_done or path is None or not path.is_file():
        raise NotFound("There is no such GGUF file of this version; export it first.")
    return path


def stream_merged_zip(version: AdapterVersion) -> Iterator[bytes]:
    """The whole model as transformers loads it, as a zip made while it is sent."""
    folder = get_model_folder(version)
    archive = ZipStream(compress_type=ZIP_STORED)
    for path in sorted(folder.iterdir()):
        archive.add_path(path, f"{file_stem(version)}-merged/{path.name}")
    yield from archive


def iter_file_chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            yield chunk


GGUF_JOB = JobKind(
    KIND, run_gguf, lane=PROGRAMS, subjects=(AdapterVersion,), output_folders=gguf_outputs
)
