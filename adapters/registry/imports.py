"""Import an adapter trained elsewhere with PEFT. The files are checked before anything is stored;
torch is not loaded and no code from them runs.

Only safetensors and configs with known keys are accepted. The base must be a model of the catalog
that the weights fit.
"""

from __future__ import annotations

import json
import math
import shutil
import stat
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from django.conf import settings
from django.core.files.uploadedfile import UploadedFile
from django.db import transaction

from adapters.models import AdapterVersion
from adapters.registry.import_checks import BaseShapes, validate_config
from adapters.registry.services import (
    build_file_manifest,
    count_bytes,
    get_weights_digest,
    move_to_version_folder,
    take_next_number,
)
from training.catalog.models import BaseModel, ModelState
from training.catalog.safetensors_header import InvalidHeader, read_header
from training.engine.file_names import ADAPTER_FILES
from training.errors import Conflict, TooLarge, UserError, to_one_line
from training.formatting import format_bytes
from training.people.models import User
from training.text_input import InvalidInput, parse_json

MAX_BYTES = 2 * 10**9
MAX_ENTRIES = 200
MAX_CONFIG_BYTES = 200_000
MAX_COMPRESSION_RATIO = 100
# Accepted dtypes: torch cannot copy F4, F6 or complex tensors into an adapter.
ADAPTER_DTYPES = frozenset(("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL"))
METHOD_BY_PEFT_TYPE = {
    "LORA": "lora",
    "IA3": "ia3",
    "PREFIX_TUNING": "prefix",
    "PROMPT_TUNING": "prompt",
    "BOTTLENECK": "bottleneck",
}


@dataclass(frozen=True)
class AdapterInfo:
    """What inspecting an adapter's folder showed."""

    method: str
    config: dict[str, Any]
    parameters: int


def import_version(
    user: User, uploads: Sequence[UploadedFile[Any]], base: BaseModel, name: str
) -> AdapterVersion:
    """Import `adapter_config.json` and `adapter_model.safetensors`, either as two files or as a zip
    with both in its root or in one folder.

    Raises:
        UserError: what is wrong and how to fix it. Nothing is stored in that case.
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
        extract_files(uploads, staging_folder)
        info = inspect_adapter(staging_folder, base)
        # A name, so that no library follows a path or URL of the upload
        config = {**info.config, "base_model_name_or_path": base.name}
        (staging_folder / ADAPTER_FILES[1]).write_text(json.dumps(config, indent=2))
        files = build_file_manifest(staging_folder)
        with transaction.atomic():
            version = AdapterVersion.objects.create(
                owner=user,
                team=user.get_sharing_team(),
                name=title,
                number=take_next_number(user, title),
                base_model=base,
                method=info.method,
                step=0,
                sha256=get_weights_digest(files),
                trainable_parameters=info.parameters,
                size_bytes=count_bytes(files),
                files=files,
                provenance={
                    "base": {"name": base.name, "revision": base.revision},
                    "imported": True,
                },
            )
            move_to_version_folder(version, staging_folder)
    finally:
        shutil.rmtree(staging_folder, ignore_errors=True)
    return version


def extract_files(uploads: Sequence[UploadedFile[Any]], target: Path) -> None:
    """Copy the two adapter files to `target`, from the uploads or from a single zip. Other uploads
    are ignored.
    """
    uploads_by_name = {str(upload.name): upload for upload in uploads}
    if not any(name in uploads_by_name for name in ADAPTER_FILES):
        if len(uploads) != 1:
            raise UserError(
                f"Choose one zip, or both {' and '.join(ADAPTER_FILES)}.",
                field="file",
                code="several_files",
            )
        unpack_zip(get_upload_file(uploads[0]), target)
        return
    for file_name in ADAPTER_FILES:
        if file_name not in uploads_by_name:
            raise UserError(
                f"{file_name} is missing. Choose both {' and '.join(ADAPTER_FILES)}.",
                field="file",
                code="missing_file",
            )
        limit = MAX_CONFIG_BYTES if file_name.endswith(".json") else MAX_BYTES
        if (uploads_by_name[file_name].size or 0) > limit:
            raise TooLarge(
                f"{file_name} is larger than {format_bytes(limit)}.", field="file", code="too_large"
            )
        with (target / file_name).open("xb") as file:
            shutil.copyfileobj(get_upload_file(uploads_by_name[file_name]), file)


def get_upload_file(upload: UploadedFile[Any]) -> IO[bytes]:
    assert upload.file is not None, "multipart uploads always have a file"
    return upload.file


def unpack_zip(upload: IO[bytes], target: Path) -> None:
    """Unpack the two adapter files and ignore the rest; the real sizes are checked
    while writing.
    """
    try:
        archive = zipfile.ZipFile(upload)
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise UserError(
            "Not a zip file. Zip the folder that PEFT's save_pretrained wrote.",
            field="file",
            code="not_a_zip",
        ) from error
    with archive:
        entries = archive.infolist()
        if len(entries) > MAX_ENTRIES:
            raise UserError(
                f"The zip has more than {MAX_ENTRIES} entries.",
                field="file",
                code="too_many_entries",
            )
        for file_name in ADAPTER_FILES:
            entry = find_entry(entries, file_name)
            limit = MAX_CONFIG_BYTES if file_name.endswith(".json") else MAX_BYTES
            if entry.file_size > limit or entry.file_size > MAX_COMPRESSION_RATIO * max(
                1, entry.compress_size
            ):
                raise TooLarge(
                    f"{file_name} would unpack to {format_bytes(entry.file_size)}; the limit is "
                    f"{format_bytes(limit)}.",
                    field="file",
                    code="too_large",
                )
            try:
                with archive.open(entry) as source, (target / file_name).open("xb") as file:
                    copy_bounded(source, file, entry.file_size, file_name)
            except (
                zipfile.BadZipFile,
                NotImplementedError,
                RuntimeError,
                EOFError,
                OSError,
            ) as error:
                raise UserError(
                    f"Cannot unpack {file_name}: {str(error)[:100]}.",
                    field="file",
                    code="broken_zip",
                ) from error


def find_entry(entries: list[zipfile.ZipInfo], name: str) -> zipfile.ZipInfo:
    """The single regular file of this name in the root of the zip or in one folder."""
    matches = [
        entry
        for entry in entries
        if PurePosixPath(entry.filename).name == name and entry.filename.count("/") <= 1
    ]
    if len(matches) > 1:
        raise UserError(
            f"The zip has more than one {name} in its root or in one folder.",
            field="file",
            code="duplicate_file",
        )
    if not matches:
        has_pickle = any(
            PurePosixPath(entry.filename).name == "adapter_model.bin" for entry in entries
        )
        hint = " Pickled weights (.bin) are not supported; save them as safetensors."
        raise UserError(
            f"The zip has no {name} in its root or in one folder.{hint if has_pickle else ''}",
            field="file",
            code="pickled_weights" if has_pickle else "missing_file",
        )
    mode = matches[0].external_attr >> 16
    if matches[0].is_dir() or (mode and not stat.S_ISREG(mode) and stat.S_IFMT(mode)):
        raise UserError(
            f"{name} in the zip is a link or a folder, not a regular file.",
            field="file",
            code="not_a_file",
        )
    return matches[0]


def copy_bounded(source: IO[bytes], target: IO[bytes], size: int, name: str) -> None:
    remaining = size
    while chunk := source.read(2**20):
        remaining -= len(chunk)
        if remaining < 0:
            raise TooLarge(
                f"{name} is larger than its size in the zip's directory.",
                field="file",
                code="too_large",
            )
        target.write(chunk)


def inspect_adapter(folder: Path, base: BaseModel) -> AdapterInfo:
    """Check an adapter's config and tensors.

    Raises:
        UserError: a config of an unknown type or with unsupported keys, invalid weights, or weights
            that do not fit the base.
    """
    try:
        config = parse_json((folder / ADAPTER_FILES[1]).read_bytes(), ADAPTER_FILES[1])
    except InvalidInput as error:
        raise UserError(
            f"{ADAPTER_FILES[1]}: {error.message}", field="file", code="invalid_json"
        ) from error
    if not isinstance(config, dict):
        raise UserError(
            f"{ADAPTER_FILES[1]} must be a JSON object.", field="file", code="invalid_json"
        )
    method = METHOD_BY_PEFT_TYPE.get(str(config.get("peft_type")))
    if method is None:
        raise UserError(
            f"{ADAPTER_FILES[1]} has peft_type {str(config.get('peft_type'))[:40]!r}; supported: "
            f"{', '.join(METHOD_BY_PEFT_TYPE)}.",
            field="file",
            code="unknown_type",
        )
    shapes = read_shapes(folder / ADAPTER_FILES[0], dtypes=ADAPTER_DTYPES)
    base_shapes: dict[str, list[int]] = {}
    for path in base.folder.glob("*.safetensors"):
        base_shapes |= read_shapes(path, dtypes=None)
    checked_config = validate_config(config, method, shapes, BaseShapes(base.name, base_shapes))
    return AdapterInfo(method, checked_config, sum(math.prod(shape) for shape in shapes.values()))


def read_shapes(path: Path, *, dtypes: frozenset[str] | None) -> dict[str, list[int]]:
    """Raises UserError for an invalid header or for a tensor with none of these dtypes."""
    try:
        tensors = read_header(path)
    except InvalidHeader as error:
        raise UserError(error.message, field="file", code=error.code) from error
    for name, tensor in tensors.items():
        if dtypes is not None and tensor.dtype not in dtypes:
            raise UserError(
                f"Tensor {name[:80]!r} in {path.name} has dtype {tensor.dtype}, which PEFT "
                "adapters do not use.",
                field="file",
                code="unsupported_dtype",
            )
    return {name: list(tensor.shape) for name, tensor in tensors.items()}
