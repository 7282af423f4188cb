"""`python -m adapters.programs.adapter_import FOLDER`: check an adapter that a user uploaded.

Untrusted files are read only in this process, under limits on memory, CPU time and bytes written.
torch is not loaded and no code from the files runs. Only safetensors and configs with known keys
are accepted, and the weights must fit the base. FOLDER/adapter then holds the adapter's two files.
"""

from __future__ import annotations

import json
import math
import stat
import sys
import zipfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple

from adapters.registry.base_copies import (
    StoredTensor,
    find_base_copies,
    read_tensors,
    remove_tensors,
)
from adapters.registry.base_shapes import BaseShapes
from adapters.registry.import_checks import MAX_BYTES, check_supported, validate_config
from training.catalog.metadata import read_json
from training.catalog.safetensors_header import InvalidHeader
from training.child_process import emit_message, main, read_params
from training.engine.file_names import ADAPTER_FILES
from training.errors import TooLarge, UserError, find_storage_error
from training.formatting import format_bytes
from training.text_input import InvalidInput, parse_json
from training.zip_errors import DAMAGED_ZIP_ERRORS

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


class Base(NamedTuple):
    """The base model of the adapter."""

    folder: Path
    name: str


class AdapterInfo(NamedTuple):
    """What the adapter's folder shows."""

    method: str
    config: dict[str, Any]
    parameters: int


def run_import(folder: Path, params: dict[str, Any]) -> None:
    """Extract and check the files that the parameters name, and report the adapter's method and
    parameters.

    Raises:
        UserError: what is wrong with the files.
    """
    base = Base(Path(params["base"]), params["base_name"])
    target = folder / "adapter"
    target.mkdir()
    extract_files({name: folder / file for name, file in params["files"].items()}, target)
    info = inspect_adapter(target, base)
    # A name, so that no library follows a path or URL of the upload
    config = {**info.config, "base_model_name_or_path": base.name}
    (target / ADAPTER_FILES[1]).write_text(json.dumps(config, indent=2))
    emit_message(adapter={"method": info.method, "parameters": info.parameters})


def extract_files(uploads: Mapping[str, Path], target: Path) -> None:
    """Move the two adapter files to `target`, from the uploads or from a single zip. `uploads` are
    the names and the copies on disk.

    Raises:
        UserError: a file is missing, too large or pickled.
    """
    if not any(name in uploads for name in ADAPTER_FILES):
        with next(iter(uploads.values())).open("rb") as file:
            unpack_zip(file, target)
        return
    for file_name in ADAPTER_FILES:
        if file_name not in uploads:
            message = f"{file_name} is missing. Choose both {' and '.join(ADAPTER_FILES)}."
            raise missing_file_error(message, uploads)
        limit = MAX_CONFIG_BYTES if file_name.endswith(".json") else MAX_BYTES
        if uploads[file_name].stat().st_size > limit:
            raise TooLarge(
                f"{file_name} is larger than {format_bytes(limit)}.", field="file", code="too_large"
            )
        uploads[file_name].rename(target / file_name)


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
        present = {
            file_name for file_name in ADAPTER_FILES if any(p.name == file_name for p in paths)
        }
        missing = next((name for name in ADAPTER_FILES if name not in present), ADAPTER_FILES[0])
        message = f"The zip has no folder with both {' and '.join(ADAPTER_FILES)}."
        if missing not in present:
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


def inspect_adapter(folder: Path, base: Base) -> AdapterInfo:
    """Check an adapter's config and tensors, and remove copies of the base's weights.

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


def run_program() -> None:
    try:
        run_import(Path(sys.argv[-1]), read_params())
    except MemoryError as error:
        raise UserError(
            "Reading the adapter needs too much memory.", field="file", code="too_large"
        ) from error


if __name__ == "__main__":
    sys.exit(main(run_program))
