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
from training.jobs.services import enqueue
from training.people.models import User

KIND = "gguf"
# What the `gguf` package can pack; K-quants it cannot. The words say what each costs.
QUANTISATIONS = {
    "f16": "16 bits: half the size of f32, answers the same",
    "q8_0": "8 bits: a quarter, hardly worse",
    "q4_1": "4 bits with an offset: an eighth, noticeably worse",
    "q4_0": "4 bits: the smallest, worst",
    "bf16": "16 bits as trained; llama.cpp rounds more than with f16",
    "f32": "32 bits: the largest, exact",
}


def export_gguf(user: User, version: AdapterVersion, quantisation: str) -> Job:
    """Begin to write a GGUF file of a version's whole model, or tell of the one that is under way
    or done.

    Raises:
        UserError: no such quantisation. Conflict: it has no whole model, and why or what to do.
    """
    if quantisation not in QUANTISATIONS:
        raise UserError(
            f"quantisation must be one of {', '.join(QUANTISATIONS)}.", field="quantisation"
        )
    model_folder(version)
    params = {"quantisation": quantisation}
    return enqueue(user, KIND, f"{version.pk}:{quantisation}", subjects=[version], params=params)


def model_folder(version: AdapterVersion) -> Path:
    """Where the whole model lies. Raises Conflict: there is none (yet)."""
    if version.whole_model:
        return version.folder
    if version.method_row.merge_unsupported_reason:
        raise Conflict(
            f"{version.method_row.title} has no whole model to export: "
            f"{version.method_row.merge_unsupported_reason} Download the adapter."
        )
    if not merge.is_merged(version):
        raise Conflict(
            "Merge this version into its base first; what is exported is the merged model."
        )
    return version.merged_folder


def run_gguf(job: Job) -> dict[str, Any]:
    version = get_subject(job, AdapterVersion, "base_model")
    assert version is not None
    quantisation = job.params["quantisation"]
    params = {
        "model": str(model_folder(version)),
        "target": str(gguf_file(version, quantisation)),
        "quantisation": quantisation,
        "prompts": merge.prompts_of(version),
    }
    return run_program(job, "adapters.programs.gguf_export", params)


def gguf_outputs(job: Job) -> list[Path]:
    version = get_subject(job, AdapterVersion)
    assert version is not None
    return [gguf_file(version, job.params["quantisation"]).parent]


def gguf_file(version: AdapterVersion, quantisation: str) -> Path:
    return version.merged_folder.parent / f"{version.pk}-gguf" / f"{quantisation}.gguf"


def made_gguf(version: AdapterVersion, quantisation: str) -> Path:
    """The file, whole and checked. Raises NotFound: it has not been made."""
    done = Job.objects.filter(
        kind=KIND, key=f"{version.pk}:{quantisation}", state=JobState.DONE
    ).exists()
    path = gguf_file(version, quantisation) if quantisation in QUANTISATIONS else None
    if not done or path is None or not path.is_file():
        raise NotFound("There is no such GGUF file of this version; export it first.")
    return path


def merged_zip(version: AdapterVersion) -> Iterator[bytes]:
    """The whole model as transformers loads it, as a zip made while it is sent."""
    folder = model_folder(version)
    archive = ZipStream(compress_type=ZIP_STORED)
    for path in sorted(folder.iterdir()):
        archive.add_path(path, f"{file_stem(version)}-merged/{path.name}")
    yield from archive


def pieces_of(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(2**20):
            yield piece


GGUF_JOB = JobKind(KIND, run_gguf, lane=PROGRAMS, subjects=(AdapterVersion,), outputs=gguf_outputs)
