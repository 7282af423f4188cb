"""Import an adapter trained elsewhere with PEFT. The files are checked before anything is stored;
torch is not loaded and no code from them runs.

Only safetensors and configs with known keys are accepted. The base must be a model of the catalog
that the weights fit. Copies of its own weights in the file are removed.
"""

from __future__ import annotations

import json
import math
import shutil
import stat
import tempfile
import zipfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from django.conf import settings
from django.core.files.uploadedfile import UploadedFile
from django.db import transaction

from adapters.models import AdapterVersion
from adapters.registry.base_copies import (
    StoredTensor,
    find_base_copies,
    read_tensors,
    remove_tensors,
)
from adapters.registry.base_shapes import BaseShapes
from adapters.registry.import_checks import check_supported, validate_config
from adapters.registry.services import (
    build_file_manifest,
    count_bytes,
    get_weights_digest,
    move_to_version_folder,
    take_next_number,
)
from training.catalog.metadata import read_json
from training.catalog.models import BaseModel, ModelState
from training.catalog.safetensors_header import InvalidHeader
from training.engine.file_names import ADAPTER_FILES
from training.errors import Conflict, TooLarge, UserError, find_storage_error, to_one_line
from training.formatting import format_bytes
from training.people.models import User
from training.text_input import InvalidInput, parse_json
from training.zip_errors import DAMAGED_ZIP_ERRORS

MAX_BYTES = 2 * 10**9
MAX_ENTRIES = 20_000
MAX_CONFIG_BYTES = 200_000
PICKLED_FILE = "adapter_model.bin"
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

    Raises:
        UserError: a file is missing, too large or pickled.
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
            message = f"{file_name} is missing. Choose both {' and '.join(ADAPTER_FILES)}."
            raise missing_file_error(message, uploads_by_name)
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
    except (*DAMAGED_ZIP_ERRORS, OSError) as error:
        raise UserError(
            "Not a zip file. Zip the folder that PEFT's save_pretrained wrote.",
            field="file",
            code="not_a_zip",
        ) from error
    with archive:
        entries = archive.infolist()
        if len(entries) > MAX_ENTRIES:
            raise UserError(
                f"The zip has more than {MAX_ENTRIES:,} entries. Zip only the adapter's folder.",
                field="file",
                code="too_many_entries",
            )
        for file_name, entry in zip(ADAPTER_FILES, find_adapter_entries(entries), strict=True):
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
            except (*DAMAGED_ZIP_ERRORS, RuntimeError, OSError) as error:  # or a password
                if find_storage_error(error):
                    raise
                raise UserError(
                    f"Cannot unpack {file_name}: {str(error)[:100]}.",
                    field="file",
                    code="broken_zip",
                ) from error


def find_adapter_entries(entries: list[zipfile.ZipInfo]) -> list[zipfile.ZipInfo]:
    """The two adapter files in the folder of the zip that is closest to its root: checkpoints lie
    deeper. Windows may separate folders with backslashes.

    Raises:
        UserError: no folder has both, several do, or the checkpoints lie in an adapter without
            safetensors.
    """
    folders: dict[PurePosixPath, list[zipfile.ZipInfo]] = {}
    paths = [PurePosixPath(entry.filename.replace("\\", "/")) for entry in entries]
    for path, entry in zip(paths, entries, strict=True):
        if path.name in ADAPTER_FILES:
            folders.setdefault(path.parent, []).append(entry)
    complete = {
        folder: sorted(files, key=lambda entry: ADAPTER_FILES.index(get_file_name(entry)))
        for folder, files in folders.items()
        if {get_file_name(entry) for entry in files} == set(ADAPTER_FILES)
    }
    if not complete:
        found = {
            file_name for file_name in ADAPTER_FILES if any(p.name == file_name for p in paths)
        }
        missing = next((name for name in ADAPTER_FILES if name not in found), ADAPTER_FILES[0])
        message = f"The zip has no folder with both {' and '.join(ADAPTER_FILES)}."
        if missing not in found:
            message = f"The zip has no {missing}."
        raise missing_file_error(message, [path.name for path in paths])
    depth = min(len(folder.parts) for folder in complete)
    closest = [folder for folder in complete if len(folder.parts) == depth]
    if len(closest) > 1 or len(complete[closest[0]]) > len(ADAPTER_FILES):
        names = ", ".join(str(folder) for folder in closest[:3])
        raise UserError(
            f"The zip has several {ADAPTER_FILES[0]} ({names[:200]}). Zip one adapter's folder.",
            field="file",
            code="duplicate_file",
        )
    check_no_outer_adapter(closest[0], paths)
    for entry in complete[closest[0]]:
        mode = entry.external_attr >> 16
        if entry.is_dir() or (mode and not stat.S_ISREG(mode) and stat.S_IFMT(mode)):
            raise UserError(
                f"{get_file_name(entry)} in the zip is a link or a folder, not a regular file.",
                field="file",
                code="not_a_file",
            )
    return complete[closest[0]]


def check_no_outer_adapter(folder: PurePosixPath, paths: Sequence[PurePosixPath]) -> None:
    """Raises UserError: a folder around this one holds an adapter that cannot be read, so that this
    one is only a checkpoint of it.
    """
    for path in paths:
        if path.name in (ADAPTER_FILES[1], PICKLED_FILE) and path.parent in folder.parents:
            message = f"The zip has {path}, but {ADAPTER_FILES[0]} only in {folder}."
            beside = [other.name for other in paths if other.parent == path.parent]
            raise missing_file_error(message, beside)


def get_file_name(entry: zipfile.ZipInfo) -> str:
    return PurePosixPath(entry.filename.replace("\\", "/")).name


def missing_file_error(message: str, names: Collection[str]) -> UserError:
    """The error for a missing file; it says so if there are pickled weights instead."""
    if PICKLED_FILE in names:
        hint = " Pickled weights (.bin) are not supported; save them as safetensors."
        return UserError(message + hint, field="file", code="pickled_weights")
    return UserError(message, field="file", code="missing_file")


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
        text = (folder / ADAPTER_FILES[1]).read_text("utf-8-sig")
        config = parse_json(text, ADAPTER_FILES[1])
    except UnicodeDecodeError as error:
        raise UserError(
            f"{ADAPTER_FILES[1]} is not UTF-8.", field="file", code="invalid_json"
        ) from error
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
    weights_path = folder / ADAPTER_FILES[0]
    try:
        tensors = read_tensors(weights_path)
        base_tensors: dict[str, StoredTensor] = {}
        for path in base.folder.glob("*.safetensors"):
            base_tensors |= read_tensors(path)
    except InvalidHeader as error:
        raise UserError(error.message, field="file", code=error.code) from error
    check_dtypes(tensors)
    check_supported(config, method)
    copies = find_base_copies(tensors, base_tensors, base.name)
    if copies:
        remove_tensors(weights_path, copies)
    shapes = get_shapes({name: info for name, info in tensors.items() if name not in copies})
    if not shapes:
        raise UserError(
            f"{ADAPTER_FILES[0]} has no weights of an adapter.", field="file", code="unknown_tensor"
        )
    base_config = read_json(base.folder / "config.json")
    base_shapes = BaseShapes(base.name, get_shapes(base_tensors), base_config)
    checked_config = validate_config(config, method, shapes, base_shapes)
    return AdapterInfo(method, checked_config, sum(math.prod(shape) for shape in shapes.values()))


def get_shapes(tensors: Mapping[str, StoredTensor]) -> dict[str, list[int]]:
    return {name: list(tensor.info.shape) for name, tensor in tensors.items()}


def check_dtypes(tensors: Mapping[str, StoredTensor]) -> None:
    """Raises UserError: a tensor has none of ADAPTER_DTYPES."""
    for name, tensor in tensors.items():
        if tensor.info.dtype not in ADAPTER_DTYPES:
            raise UserError(
                f"Tensor {name[:80]!r} in {tensor.path.name} has dtype {tensor.info.dtype}, which "
                "PEFT adapters do not use.",
                field="file",
                code="unsupported_dtype",
            )
