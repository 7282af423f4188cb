"""Export the full model of a version as GGUF in the background, and download it as a zip."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from zipstream import ZIP_STORED, ZipStream

from adapters.export import merge
from adapters.lanes import PROGRAMS
from adapters.models import AdapterVersion, file_stem
from training.child_process import get_model_program_limits
from training.engine.files import measure_tree
from training.errors import Conflict, NotFound, UserError
from training.jobs.kinds import JobKind
from training.jobs.models import Job, JobState
from training.jobs.runner import get_subject, run_program
from training.jobs.services import get_job
from training.people.models import User

KIND = "gguf"
# The formats offered for export, with what each costs; gguf_file.py can write more
QUANTIZATIONS = {
    "f16": "16 bits: half the size of f32, same answers",
    "q8_0": "8 bits: a quarter of the size, almost no quality loss",
    "q4_1": "4 bits with an offset: an eighth of the size, noticeable quality loss",
    "q4_0": "4 bits: smallest size, largest quality loss",
    "bf16": "16 bits as trained; llama.cpp is less precise than with f16",
    "f32": "32 bits: largest size, exact",
}

# Blocks of 32 weights have one or two scales of 16 bits
BYTES_PER_WEIGHT = {
    "f32": 4.0,
    "f16": 2.0,
    "bf16": 2.0,
    "q8_0": 34 / 32,
    "q4_1": 20 / 32,
    "q4_0": 18 / 32,
}


def export_gguf(user: User, version: AdapterVersion, quantization: str) -> Job:
    """Start a GGUF export of a version's full model, or return the job that is running or done.

    Raises:
        UserError: unknown quantization.
        Conflict: the version has no full model, or a disk quota would be exceeded.
    """
    check_quantization(quantization)
    get_model_folder(version)
    parameters = version.base_model.metadata.get("parameters") or 0
    return merge.enqueue_export(
        user,
        KIND,
        f"{version.pk}:{quantization}",
        version,
        disk_bytes=int(parameters * BYTES_PER_WEIGHT[quantization]),
        params={"quantization": quantization},
    )


def get_gguf_job(version: AdapterVersion, quantization: str) -> Job:
    """The export with this quantization, whatever its state.

    Raises:
        UserError: unknown quantization.
        NotFound: no such export was started.
    """
    check_quantization(quantization)
    return get_job(KIND, f"{version.pk}:{quantization}")


def check_quantization(quantization: str) -> None:
    if quantization not in QUANTIZATIONS:
        raise UserError(
            f"quantization must be one of {', '.join(QUANTIZATIONS)}.", field="quantization"
        )


def get_model_folder(version: AdapterVersion) -> Path:
    """The folder of the full model. Raises Conflict if there is none (yet)."""
    if version.is_full_model:
        return version.folder
    if version.method_spec.merge_unsupported_reason:
        raise Conflict(
            f"{version.method_spec.title} has no full model to export: "
            f"{version.method_spec.merge_unsupported_reason} Download the adapter instead."
        )
    if not merge.is_merged(version):
        raise Conflict(
            "Merge this version into its base model first: the merged model is exported.",
            code="not_merged",
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
    limits = get_model_program_limits(measure_tree(get_model_folder(version)))
    return run_program(job, "adapters.programs.gguf_export", params, limits=limits)


def gguf_outputs(job: Job) -> list[Path]:
    version = get_subject(job, AdapterVersion)
    assert version is not None
    return [gguf_path(version, job.params["quantization"]).parent]


def gguf_path(version: AdapterVersion, quantization: str) -> Path:
    return version.gguf_folder / f"{quantization}.gguf"


def get_gguf(version: AdapterVersion, quantization: str) -> Path:
    """The finished and checked file. Raises NotFound if it has not been exported."""
    is_done = Job.objects.filter(
        kind=KIND, key=f"{version.pk}:{quantization}", state=JobState.DONE
    ).exists()
    path = gguf_path(version, quantization) if quantization in QUANTIZATIONS else None
    if not is_done or path is None or not path.is_file():
        raise NotFound("This version has no such GGUF file. Export it first.")
    return path


def stream_merged_zip(version: AdapterVersion) -> Iterator[bytes]:
    """Stream the full model, in transformers' format, as an uncompressed zip."""
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
    KIND,
    run_gguf,
    lane=PROGRAMS,
    subjects=(AdapterVersion,),
    output_folders=gguf_outputs,
    on_done=merge.save_export,
    on_failed=merge.update_version_disk_bytes,
)
