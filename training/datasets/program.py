"""The program that reads an upload: `python -m training.datasets.program detect|check|save|fetch
FOLDER`.

Untrusted files are read only in this process, under limits on memory, CPU time and bytes written.
FOLDER/params.json holds the parameters; progress and result are JSON lines on stdout. No Django
here.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from training.child_process import emit_message, main, read_params
from training.datasets.archives import unpack_files
from training.datasets.build import BuildOptions, build_version
from training.datasets.check import Source, check_sources
from training.datasets.column_mapping import ColumnMapping
from training.datasets.errors import BadFile, BadRow
from training.datasets.formats import EXTENSION_FORMATS, Format, detect_format
from training.datasets.mapping_guess import guess_mapping
from training.datasets.records import iter_records
from training.errors import UserError, find_storage_error

SAMPLE_RECORDS = 200
TEXT_NOTE = "The file is read as plain text, but its name does not say that it is."
TABLE_NOTE = (
    "Every line has the same number of tabs, as in a table. The file is read as plain text; to use "
    "its columns, upload it with the ending .tsv."
)
SAMPLE_BYTES = 512 * 2**10
SAMPLE_READ_BYTES = 16 * 2**20
HEARTBEAT_INTERVAL = 5.0
Sample = list[tuple[int, dict[str, Any] | None, str]]  # line, record or None, problem


def emit_progress(done: float, message: str) -> None:
    emit_message(done=done, message=message)


def emit_heartbeats() -> None:
    """Runs in a daemon thread of this process until it exits: long steps emit no messages, and the
    worker checks its time limit and cancellation at each message.
    """
    while True:
        time.sleep(HEARTBEAT_INTERVAL)
        emit_message(alive=True)


def run_detect(folder: Path, params: dict[str, Any]) -> None:
    """Unpack zips, detect the formats of all files, and guess the column mapping from the first
    records of the largest file: a small one beside the data may be metadata.

    Raises:
        BadFile: a file cannot be read, or none of the first rows.
    """
    files = [
        {**file, "format": file.get("format") or detect_file(folder, file).to_dict()}
        for file in unpack_files(folder, params["files"], max_bytes=params["max_bytes"])
    ]
    largest = max(files, key=lambda file: (folder / file["file"]).stat().st_size)
    sample = read_sample(folder / largest["file"], Format(**largest["format"]))
    records = [record for _, record, _ in sample if record is not None]
    if not any(records):
        raise BadFile(describe_unreadable(sample, Format(**largest["format"])), field="file")
    mapping = guess_mapping(records)
    if largest["format"]["kind"] == "text":
        mapping = check_text_mapping(mapping, largest["name"], records)
    (folder / "sample.json").write_text(json.dumps(sample))
    emit_message(detected={"files": files, "mapping": mapping.to_dict()})


def check_text_mapping(
    mapping: ColumnMapping, name: str, records: list[dict[str, Any]]
) -> ColumnMapping:
    """The mapping of a text file, as a guess if the file may be something else."""
    lines = [line for record in records for line in str(record.get("text", "")).splitlines()]
    tabs = {line.count("\t") for line in lines}
    note = TABLE_NOTE if len(lines) > 1 and len(tabs) == 1 and tabs != {0} else ""
    note = note if is_text_name(name) else TEXT_NOTE
    return replace(mapping, is_certain=False, note=note) if note else mapping


def is_text_name(name: str) -> bool:
    suffix = Path(name.lower().removesuffix(".gz")).suffix
    return not suffix or EXTENSION_FORMATS.get(suffix) == "text"


def detect_file(folder: Path, file: dict[str, Any]) -> Format:
    """Raises BadFile: the file cannot be read; the message begins with its name."""
    try:
        return detect_format(folder / file["file"], file["name"])
    except BadFile as error:
        raise BadFile(f"{file['name']}: {error.message}", field="file") from error


def describe_unreadable(sample: Sample, file_format: Format) -> str:
    """Why no row of the sample could be read."""
    if not sample:
        return "The file has no rows."
    line, _, problem = next((item for item in sample if item[2]), (1, None, "no row has a value"))
    return (
        f"No row of the file can be read. {file_format.location_unit.capitalize()} {line:,}: "
        f"{problem}."
    )


def read_sample(path: Path, file_format: Format) -> Sample:
    """The first records as (line, record, problem). An error that ends the file also ends the
    sample; the check reports it.
    """
    sample: Sample = []
    size = 0
    try:
        for line, record in iter_records(path, file_format, max_bytes=SAMPLE_READ_BYTES):
            item = (
                (line, None, record.message) if isinstance(record, BadRow) else (line, record, "")
            )
            size += len(json.dumps(item))
            if sample and size > SAMPLE_BYTES:
                break
            sample.append(item)
            if len(sample) >= SAMPLE_RECORDS:
                break
    except BadFile:
        if not sample:
            raise
    return sample


def run_check(folder: Path, params: dict[str, Any]) -> None:
    sources = [
        Source(folder / file["file"], Format(**file["format"]), file.get("split", ""), file["name"])
        for file in params["files"]
    ]
    mapping = ColumnMapping.from_dict(params["mapping"])
    emit_message(
        report=check_sources(
            sources, mapping, folder, max_bytes=params["max_bytes"], report_progress=emit_progress
        )
    )


def run_save(folder: Path, params: dict[str, Any]) -> None:
    emit_progress(0.0, "writing")
    emit_message(
        version=build_version(folder, BuildOptions(**params["build_options"]), Path(params["root"]))
    )


def run_fetch(folder: Path, params: dict[str, Any]) -> None:
    from training.datasets.hub import download_dataset

    files = download_dataset(
        params["hub_id"], folder, max_bytes=params["max_bytes"], report_progress=emit_progress
    )
    run_detect(folder, {**params, "files": files})


ACTIONS = {"detect": run_detect, "check": run_check, "save": run_save, "fetch": run_fetch}


def run_program(action: str, folder: Path) -> None:
    params = read_params()
    threading.Thread(target=emit_heartbeats, daemon=True).start()
    run_action(action, folder, params)


def run_action(action: str, folder: Path, params: dict[str, Any]) -> None:
    """Run an action.

    Raises:
        UserError: a problem with the file or the disk.
    """
    try:
        ACTIONS[action](folder, params)
    except MemoryError as error:
        raise UserError(
            "Reading the file needs too much memory. Split it into smaller files.", field="file"
        ) from error
    except OSError as error:
        raise find_storage_error(error) or UserError(
            f"Writing to disk failed ({error.strerror}).", field="file"
        ) from error


if __name__ == "__main__":
    sys.exit(main(lambda: run_program(sys.argv[1], Path(sys.argv[2]))))
