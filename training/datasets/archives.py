"""Unpacks a zip of data files, such as a folder that `datasets.save_to_disk` wrote. Runs only in
the program that reads uploads, under its limits. No ORM here.
"""

from __future__ import annotations

import errno
import json
import shutil
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any

from training.datasets.errors import BadFile
from training.datasets.formats import EXTENSION_FORMATS, ZIP_MAGIC
from training.datasets.rows import find_split
from training.zip_errors import DAMAGED_ZIP_ERRORS

MAX_FILES = 1_000
END_RECORD_BYTES = 22 + 65_535  # the record and its longest comment
DATA_EXTENSIONS = (".arrow", ".parquet", *EXTENSION_FORMATS)
TEXT_EXTENSIONS = (".txt", ".md")
MAX_ENTRIES = 65_534  # more need a zip64 directory, whose parsing takes a gigabyte for 2 million
DATASETS_METADATA = ("state.json", "dataset_info.json", "dataset_dict.json", "dataset_infos.json")


def is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == ZIP_MAGIC


def unpack_files(
    folder: Path, files: list[dict[str, Any]], *, max_bytes: int
) -> list[dict[str, Any]]:
    """The files of an upload, with each zip replaced by the data files in it. Their split is the
    one of the zip, or the one that their folder names.

    Raises:
        BadFile: a zip is damaged, encrypted or too large, or holds no data files.
    """
    unpacked: list[dict[str, Any]] = []
    for file in files:
        path = folder / file["file"]
        if file.get("format") or not is_zip(path):
            unpacked.append(file)
            continue
        check_entry_count(path)
        try:
            with zipfile.ZipFile(path) as archive:
                unpacked += unpack_zip(archive, folder, file, max_bytes)
        except (*DAMAGED_ZIP_ERRORS, OSError) as error:
            # bz2's error has no number, and an offset before the start is an invalid argument
            if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
                raise
            raise BadFile(
                f"The zip file is damaged ({error}). Create it again.", field="file"
            ) from error
        except RuntimeError as error:  # zipfile's error for a password
            raise BadFile(
                "The zip file is encrypted. Upload it without a password.", field="file"
            ) from error
        path.unlink()
    return unpacked


def check_entry_count(path: Path) -> None:
    """Raises BadFile: the zip has more than MAX_ENTRIES entries. Reads only its end record."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - END_RECORD_BYTES))
        tail = file.read()
    end = tail.rfind(b"PK\x05\x06")
    if end >= 0 and int.from_bytes(tail[end + 10 : end + 12], "little") > MAX_ENTRIES:
        raise BadFile(f"The zip file has more than {MAX_ENTRIES:,} entries.", field="file")


def unpack_zip(
    archive: zipfile.ZipFile, folder: Path, file: dict[str, Any], max_bytes: int
) -> list[dict[str, Any]]:
    members = {
        member.filename.replace("\\", "/"): member
        for member in archive.infolist()
        if not member.is_dir() and is_data_file(member.filename.replace("\\", "/"))
    }
    if any(not name.endswith(TEXT_EXTENSIONS) for name in members):  # a README beside the data
        members = {n: m for n, m in members.items() if not n.lower().endswith(TEXT_EXTENSIONS)}
    if any(member.filename == "xl/workbook.xml" for member in archive.infolist()):
        raise BadFile("The file is an Excel workbook. Save the sheet as CSV.", field="file")
    if not members:
        raise BadFile(
            "The zip file holds no data files (JSON Lines, JSON, CSV, Parquet, Arrow or text).",
            field="file",
        )
    if len(members) > MAX_FILES:
        raise BadFile(
            f"The zip file holds {len(members):,} data files; at most {MAX_FILES:,} are supported.",
            field="file",
        )
    if sum(member.file_size for member in members.values()) > max_bytes:
        raise BadFile(
            "The unpacked files exceed the size limit. Split them into smaller uploads.",
            field="file",
        )
    unpacked = []
    for number, name in enumerate(list_in_order(archive, members), start=1):
        target = f"{file['file']}.{number}"
        with archive.open(members[name]) as source, (folder / target).open("wb") as out:
            shutil.copyfileobj(source, out)  # zipfile ends at the size in the directory
        path = PurePosixPath(name)
        split = file.get("split") or find_split(path.name) or find_split(path.parent.name)
        unpacked.append({"file": target, "name": name[-100:], "split": split})
    return sorted(unpacked, key=lambda entry: entry["split"] not in ("", "train"))


def is_data_file(name: str) -> bool:
    """Whether a member is a data file, and neither metadata nor hidden."""
    path = PurePosixPath(name.lower())
    return (
        path.name not in DATASETS_METADATA
        and PurePosixPath(path.name.removesuffix(".gz")).suffix in DATA_EXTENSIONS
        and not any(
            part.startswith((".", "__macosx")) for part in path.parts if part not in (".", "..")
        )
    )


def list_in_order(archive: zipfile.ZipFile, members: dict[str, zipfile.ZipInfo]) -> list[str]:
    """The names of the members: Arrow files in the order of their `state.json`, others by name.
    Files that `datasets` only cached are left out.
    """
    listed: list[str] = []
    folders: set[str] = set()
    for member in archive.infolist():
        path = PurePosixPath(member.filename.replace("\\", "/"))
        if path.name == "state.json" and member.file_size < 2**20:
            try:
                state = json.loads(archive.read(member))
                names = [str(entry["filename"]) for entry in state["_data_files"]]
            except (ValueError, KeyError, TypeError, RecursionError):
                continue
            folders.add(str(path.parent))
            listed += [
                str(path.parent / name) for name in names if str(path.parent / name) in members
            ]
    others = [
        name
        for name in sorted(members)
        if not (name.endswith(".arrow") and str(PurePosixPath(name).parent) in folders)
    ]
    return listed + others
