"""An adapter made elsewhere with PEFT: looked through before anything of it is kept. No torch, and
nothing is run.

Only safetensors and a config whose every key is known are taken; its base must be a model of the
catalog that the weights fit.
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
from adapters.registry.import_checks import Fit, fitted
from adapters.registry.services import bytes_of, facts_of, move_in, next_number, weights_sha256
from training.catalog.models import BaseModel, ModelState
from training.catalog.safetensors_header import InvalidHeader, read_header
from training.engine.file_names import ADAPTER_FILES
from training.errors import Conflict, TooLarge, UserError, one_line
from training.formatting import format_bytes
from training.people.models import User

MOST_BYTES = 2 * 10**9
MOST_ENTRIES = 200
MOST_CONFIG_BYTES = 200_000
MOST_RATIO = 100
# Types of tensors that are taken; torch cannot copy F4, F6 or complex ones into an adapter.
ADAPTER_DTYPES = frozenset(("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL"))
KNOWN_TYPES = {
    "LORA": "lora",
    "IA3": "ia3",
    "PREFIX_TUNING": "prefix",
    "PROMPT_TUNING": "prompt",
    "BOTTLENECK": "bottleneck",
}


@dataclass(frozen=True)
class Looked:
    """What a folder of an adapter turned out to be."""

    method: str
    config: dict[str, Any]
    parameters: int


def import_version(
    user: User, uploads: Sequence[UploadedFile[Any]], base: BaseModel, name: str
) -> AdapterVersion:
    """Take in `adapter_config.json` and `adapter_model.safetensors`: as they are, or in a zip, in
    its root or one folder.

    Raises:
        UserError: what is wrong with it, and what to do. Nothing of it is kept then.
    """
    if base.state != ModelState.READY:
        raise Conflict(f"{base.name} is not ready yet.", field="base")
    title = one_line(name)[:120]
    if not title:
        raise UserError("An adapter needs a name.", field="name")
    root = Path(settings.HOME) / "adapters"
    root.mkdir(exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=".import-", dir=root))
    try:
        take_in(uploads, aside)
        looked = look_through(aside, base)
        # A name, not a path or an address that a library might go to.
        config = {**looked.config, "base_model_name_or_path": base.name}
        (aside / ADAPTER_FILES[1]).write_text(json.dumps(config, indent=2))
        files = facts_of(aside)
        with transaction.atomic():
            version = AdapterVersion.objects.create(
                owner=user,
                team=user.first_team(),
                name=title,
                number=next_number(user, title),
                base_model=base,
                method=looked.method,
                step=0,
                sha256=weights_sha256(files),
                trainable_parameters=looked.parameters,
                size_bytes=bytes_of(files),
                files=files,
                record={"base": {"name": base.name, "revision": base.revision}, "imported": True},
            )
            move_in(version, aside)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return version


def take_in(uploads: Sequence[UploadedFile[Any]], target: Path) -> None:
    """The two files, whatever else was chosen with them, or what is in the one zip."""
    named = {str(upload.name): upload for upload in uploads}
    if not any(name in named for name in ADAPTER_FILES):
        if len(uploads) != 1:
            raise UserError(f"Choose one zip, or {' and '.join(ADAPTER_FILES)} together.", field="file")
        unpack(opened(uploads[0]), target)
        return
    for wanted in ADAPTER_FILES:
        if wanted not in named:
            raise UserError(
                f"{wanted} is missing; choose {' and '.join(ADAPTER_FILES)} together.", field="file"
            )
        limit = MOST_CONFIG_BYTES if wanted.endswith(".json") else MOST_BYTES
        if (named[wanted].size or 0) > limit:
            raise TooLarge(f"{wanted} has more than {format_bytes(limit)}.", field="file")
        with (target / wanted).open("xb") as file:
            shutil.copyfileobj(opened(named[wanted]), file)


def opened(upload: UploadedFile[Any]) -> IO[bytes]:
    assert upload.file is not None, "a form's file has been received"
    return upload.file


def unpack(upload: IO[bytes], target: Path) -> None:
    """The two files out of the zip, whatever else is in it; sizes are counted while they are
    written.
    """
    try:
        archive = zipfile.ZipFile(upload)
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise UserError(
            "This is no zip file; zip the folder that PEFT's save_pretrained made.", field="file"
        ) from error
    with archive:
        entries = archive.infolist()
        if len(entries) > MOST_ENTRIES:
            raise UserError(
                f"The zip has more than {MOST_ENTRIES} entries; an adapter has a handful.",
                field="file",
            )
        for wanted in ADAPTER_FILES:
            entry = find(entries, wanted)
            limit = MOST_CONFIG_BYTES if wanted.endswith(".json") else MOST_BYTES
            if entry.file_size > limit or entry.file_size > MOST_RATIO * max(
                1, entry.compress_size
            ):
                raise TooLarge(
                    f"{wanted} would have {format_bytes(entry.file_size)} unpacked; at most "
                    f"{format_bytes(limit)} are taken.",
                    field="file",
                )
            try:
                with archive.open(entry) as source, (target / wanted).open("xb") as file:
                    copy_bounded(source, file, entry.file_size, wanted)
            except (
                zipfile.BadZipFile,
                NotImplementedError,
                RuntimeError,
                EOFError,
                OSError,
            ) as error:
                raise UserError(
                    f"{wanted} cannot be unpacked: {str(error)[:100]}.", field="file"
                ) from error


def find(entries: list[zipfile.ZipInfo], name: str) -> zipfile.ZipInfo:
    """The one plain file of this name, in the root or in one folder."""
    found = [
        entry
        for entry in entries
        if PurePosixPath(entry.filename).name == name and entry.filename.count("/") <= 1
    ]
    if len(found) != 1:
        old = any(PurePosixPath(entry.filename).name == "adapter_model.bin" for entry in entries)
        hint = (
            " Pickled weights (.bin) are never read; save them as safetensors."
            if old and not found
            else ""
        )
        words = "no" if not found else "more than one"
        raise UserError(
            f"The zip holds {words} {name}, in its root or in one folder.{hint}", field="file"
        )
    mode = found[0].external_attr >> 16
    if found[0].is_dir() or (mode and not stat.S_ISREG(mode) and stat.S_IFMT(mode)):
        raise UserError(f"{name} in the zip is a link or a folder, not a file.", field="file")
    return found[0]


def copy_bounded(source: IO[bytes], target: IO[bytes], size: int, name: str) -> None:
    left = size
    while piece := source.read(2**20):
        left -= len(piece)
        if left < 0:
            raise TooLarge(f"{name} has more bytes than the zip says.", field="file")
        target.write(piece)


def look_through(folder: Path, base: BaseModel) -> Looked:
    """Raises UserError: a config that names code or an unknown type, broken weights, or weights
    that do not fit the base.
    """
    try:
        config = json.loads((folder / ADAPTER_FILES[1]).read_text())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{ADAPTER_FILES[1]} is not JSON: {str(error)[:100]}.", field="file") from error
    if not isinstance(config, dict):
        raise UserError(f"{ADAPTER_FILES[1]} must be a JSON object.", field="file")
    method = KNOWN_TYPES.get(str(config.get("peft_type")))
    if method is None:
        raise UserError(
            f"{ADAPTER_FILES[1]} is of type {str(config.get('peft_type'))[:40]!r}; "
            f"{', '.join(KNOWN_TYPES)} are taken.",
            field="file",
        )
    shapes = read_shapes(folder / ADAPTER_FILES[0], dtypes=ADAPTER_DTYPES)
    known: dict[str, list[int]] = {}
    for path in base.folder.glob("*.safetensors"):
        known |= read_shapes(path, dtypes=None)
    kept = fitted(config, method, shapes, Fit(base.name, known))
    return Looked(method, kept, sum(math.prod(shape) for shape in shapes.values()))


def read_shapes(path: Path, *, dtypes: frozenset[str] | None) -> dict[str, list[int]]:
    """Raises UserError: a broken header, or a tensor of none of these types."""
    try:
        tensors = read_header(path)
    except InvalidHeader as error:
        raise UserError(error.message, field="file") from error
    for name, tensor in tensors.items():
        if dtypes is not None and tensor.dtype not in dtypes:
            raise UserError(
                f"The tensor {name[:80]!r} in {path.name} is of type {tensor.dtype}, in which PEFT "
                "saves no adapter.",
                field="file",
            )
    return {name: list(tensor.shape) for name, tensor in tensors.items()}
