"""`python -m training.datasets.program look|check|save|fetch FOLDER`: the work on an upload, in a
process of its own.

Untrusted files are read here and nowhere else, under limits on memory, time and what is written.
FOLDER/params.json says what to do; progress and the result are JSON lines on stdout. It knows no
Django.
"""

from __future__ import annotations

import json
import resource
import sys
import threading
import time
from pathlib import Path
from typing import Any

from training.child_process import emit, main, read_params
from training.datasets.build import Choices, build
from training.datasets.check import Source, check
from training.datasets.formats import BadFile, Format, detect
from training.datasets.forms import Mapped, guess
from training.datasets.records import records
from training.datasets.rows import BadRow
from training.errors import UserError

# Address space (what a check of 2 GiB touches is a tenth of it) and CPU seconds; a look is asked
# for by the web server.
LIMITS = {
    "look": (3 * 2**30, 20),
    "check": (4 * 2**30, 3600),
    "save": (4 * 2**30, 3600),
    "fetch": (4 * 2**30, 3600),
}
SAMPLE_RECORDS = 200
SAMPLE_BYTES = 512 * 2**10
SAMPLE_READ_BYTES = 16 * 2**20
ALIVE_SECONDS = 5.0


def emit_progress(done: float, message: str) -> None:
    emit(done=done, message=message)


def stay_alive() -> None:
    """Long steps say nothing by themselves; whoever follows must know that this is not a
    hang-up.
    """
    while True:
        time.sleep(ALIVE_SECONDS)
        emit(alive=True)


def run_look(folder: Path, order: dict[str, Any]) -> None:
    """Formats of all files, the first records of the first one, and what its columns seem to
    mean.
    """
    formats = [
        Format(**f["format"]) if f.get("format") else detect(folder / f["file"], f["name"])
        for f in order["files"]
    ]
    sample = take_sample(folder / order["files"][0]["file"], formats[0])
    mapped = guess([record for _, record, _ in sample if record is not None])
    (folder / "sample.json").write_text(json.dumps(sample))
    emit(looked={"formats": [form.to_dict() for form in formats], "mapped": mapped.to_dict()})


def take_sample(path: Path, form: Format) -> list[tuple[int, dict[str, Any] | None, str]]:
    """(line, record, what is wrong with it). What ends the file early ends the sample, too; the
    check names it.
    """
    sample: list[tuple[int, dict[str, Any] | None, str]] = []
    size = 0
    try:
        for line, found in records(path, form, most_bytes=SAMPLE_READ_BYTES):
            one = (
                (line, None, found.message)
                if isinstance(found, BadRow)
                else (line, storable(found), "")
            )
            size += len(json.dumps(one))
            if sample and size > SAMPLE_BYTES:
                break
            sample.append(one)
            if len(sample) >= SAMPLE_RECORDS:
                break
    except BadFile:
        if not sample:
            raise
    return sample


def storable(record: dict[str, Any]) -> dict[str, Any]:
    """Dates and other things that only Parquet has, as their text."""
    made: dict[str, Any] = json.loads(json.dumps(record, default=str))
    return made


def run_check(folder: Path, order: dict[str, Any]) -> None:
    sources = [
        Source(folder / file["file"], Format(**file["format"]), file.get("split", ""), file["name"])
        for file in order["files"]
    ]
    mapped = Mapped.from_dict(order["mapped"])
    emit(report=check(sources, mapped, folder, most_bytes=order["most_bytes"], tell=emit_progress))


def run_save(folder: Path, order: dict[str, Any]) -> None:
    emit_progress(0.0, "writing")
    emit(built=build(folder, Choices(**order["choices"]), Path(order["root"])))


def run_fetch(folder: Path, order: dict[str, Any]) -> None:
    from training.datasets.hub import fetch

    files = fetch(order["hub_id"], folder, most_bytes=order["most_bytes"], tell=emit_progress)
    emit(files=files)
    run_look(folder, {"files": files})


ACTS = {"look": run_look, "check": run_check, "save": run_save, "fetch": run_fetch}


def run(act: str, folder: Path) -> None:
    memory, seconds = LIMITS[act]
    order = read_params()
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
    resource.setrlimit(resource.RLIMIT_FSIZE, (order["most_written"], order["most_written"]))
    threading.Thread(target=stay_alive, daemon=True).start()
    run_act(act, folder, order)


def run_act(act: str, folder: Path, order: dict[str, Any]) -> None:
    """Raises UserError: what is wrong with the file, or with the disk."""
    try:
        ACTS[act](folder, order)
    except MemoryError as error:
        raise UserError(
            "The file needs more memory than reading it may take; split it.", field="file"
        ) from error
    except OSError as error:
        raise UserError(
            f"The disk did not take what was written ({error.strerror}).", field="file"
        ) from error


if __name__ == "__main__":
    sys.exit(main(lambda: run(sys.argv[1], Path(sys.argv[2]))))
