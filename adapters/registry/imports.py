"""Import an adapter trained elsewhere with PEFT. A child program
(`adapters.programs.adapter_import`) checks the files before anything is stored.
"""

from __future__ import annotations

import logging
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from django.conf import settings
from django.core.files.uploadedfile import UploadedFile
from django.db import transaction

from adapters.models import AdapterVersion
from adapters.registry.import_checks import MAX_BYTES
from adapters.registry.services import (
    build_file_manifest,
    count_bytes,
    get_weights_digest,
    move_to_version_folder,
    take_next_number,
)
from training.catalog.models import BaseModel, ModelState
from training.child_process import (
    GIB,
    ProgramLimits,
    build_error,
    read_messages,
    run_child,
    write_params,
)
from training.engine.file_names import ADAPTER_FILES
from training.errors import Conflict, UserError, to_one_line
from training.people.current_user import hold_program_slot
from training.people.disk_quota import check_disk_quota
from training.people.models import User

TIMEOUT_SECONDS = 120
LIMITS = ProgramLimits(
    address_space_bytes=2 * GIB, counted_bytes=GIB, cpu_seconds=60, file_bytes=MAX_BYTES
)
log = logging.getLogger("snapml.adapters")


def import_version(
    user: User, uploads: Sequence[UploadedFile[Any]], base: BaseModel, name: str
) -> AdapterVersion:
    """Import `adapter_config.json` and `adapter_model.safetensors`, either as two files or as a zip
    with both in its root or in one folder.

    Raises:
        UserError: what is wrong and how to fix it; nothing is stored.
        Conflict: a disk quota would be exceeded; nothing is stored.
    """
    if base.state != ModelState.READY:
        raise Conflict(f"Base model {base.name} is not ready yet.", field="base")
    title = to_one_line(name)[:120]
    if not title:
        raise UserError("Enter a name for the adapter.", field="name")
    root = Path(settings.HOME) / "adapters"
    root.mkdir(exist_ok=True)
    staging_folder = Path(tempfile.mkdtemp(prefix=".import-", dir=root))
    try:
        adapter = check_files(select_uploads(uploads), base, staging_folder)
        files = build_file_manifest(staging_folder / "adapter")
        size, team = count_bytes(files), user.get_sharing_team()
        with transaction.atomic():
            check_disk_quota(user, team, size)
            version = AdapterVersion.objects.create(
                owner=user,
                team=team,
                name=title,
                number=take_next_number(user, title),
                base_model=base,
                method=adapter["method"],
                step=0,
                sha256=get_weights_digest(files),
                trainable_parameters=adapter["parameters"],
                size_bytes=size,
                disk_bytes=size,
                files=files,
                provenance={
                    "base": {"name": base.name, "revision": base.revision},
                    "imported": True,
                },
            )
            move_to_version_folder(version, staging_folder / "adapter")
    finally:
        shutil.rmtree(staging_folder, ignore_errors=True)
    return version


def select_uploads(uploads: Sequence[UploadedFile[Any]]) -> dict[str, UploadedFile[Any]]:
    """The files of an adapter, by name, or a single zip. Other files are ignored, but named in
    errors.

    Raises:
        UserError: several files, and none of them is of an adapter.
    """
    by_name = {str(upload.name): upload for upload in uploads}
    if any(name in by_name for name in ADAPTER_FILES):
        return by_name
    if len(uploads) != 1:
        raise UserError(
            f"Choose one zip, or both {' and '.join(ADAPTER_FILES)}.",
            field="file",
            code="several_files",
        )
    return by_name


def check_files(
    uploads: dict[str, UploadedFile[Any]], base: BaseModel, folder: Path
) -> dict[str, Any]:
    """Copy the uploads into the folder, and let the program check them and put the adapter's files
    into `folder/adapter`. Returns its method and number of parameters.

    Raises:
        UserError: what is wrong with the files.
        SlotsBusy: too many programs run on this host.
    """
    files = {name: str(number) for number, name in enumerate(uploads)}
    for name, upload in uploads.items():
        if name not in ADAPTER_FILES and len(uploads) > 1:
            continue
        with (folder / files[name]).open("xb") as file:
            shutil.copyfileobj(get_upload_file(upload), file)
    write_params(folder, {"files": files, "base": str(base.folder), "base_name": base.name})
    try:
        with hold_program_slot(LIMITS.counted_bytes):
            completed = run_child(
                "adapters.programs.adapter_import",
                str(folder),
                cwd=settings.BASE_DIR,
                seconds=TIMEOUT_SECONDS,
                limits=LIMITS,
            )
    except subprocess.TimeoutExpired as error:
        raise UserError(
            "Reading the adapter takes too long.", field="file", code="too_large"
        ) from error
    for message in read_messages(completed.stdout):
        if "error" in message:
            raise build_error(message)
        adapter: dict[str, Any] = message["adapter"]
        return adapter
    log.error(
        "The check of an adapter exited with code %s: %s",
        completed.returncode,
        completed.stderr[-2000:],
    )
    raise UserError(
        "Reading the adapter failed, or took too much time or memory. An admin finds the reason in "
        "the web server's log.",
        field="file",
        code="import_failed",
    )


def get_upload_file(upload: UploadedFile[Any]) -> IO[bytes]:
    assert upload.file is not None, "multipart uploads always have a file"
    return upload.file
