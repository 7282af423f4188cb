"""List and read the files of a run. File names never come from a request, so no path can lead
outside the run's folder.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from training.engine.file_names import STATE_FILES
from training.runs.models import Run

TAIL_BYTES = 16_000
ANSI_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
LISTED_FILES = ("config.json", "events.jsonl", "result.json", "engine.log")


@dataclass(frozen=True)
class RunFile:
    name: str
    size_bytes: int


def list_files(run: Run) -> list[RunFile]:
    """The run's own files, its checkpoints and its adapter, with their sizes. Symbolic links are
    left out.
    """
    paths = [run.folder / name for name in LISTED_FILES]
    for part in ("checkpoints", "adapter"):
        paths += sorted(
            path for path in (run.folder / part).rglob("*") if not path.name.startswith(".")
        )
    return [
        RunFile(str(path.relative_to(run.folder)), path.stat().st_size)
        for path in paths
        if path.is_file()
        and not path.is_symlink()
        and "/." not in str(path.relative_to(run.folder))
    ]


def list_checkpoint_steps(run: Run) -> list[int]:
    """The steps of the run's complete checkpoints, oldest first."""
    folders = (run.folder / "checkpoints").glob("step-*")
    return sorted(
        int(folder.name.removeprefix("step-"))
        for folder in folders
        if (folder / STATE_FILES[2]).is_file()
    )


def read_engine_output(run: Run) -> str:
    """The end of what the engine and its libraries printed, without colors and without overwritten
    progress bars.
    """
    path = run.folder / "engine.log"
    if not path.is_file():
        return ""
    try:
        # A symbolic link could expose another file of the server.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return ""
    with os.fdopen(descriptor, "rb") as file:
        file.seek(max(0, os.fstat(descriptor).st_size - TAIL_BYTES))
        text = file.read().decode("utf-8", errors="replace")
    lines = [line.rsplit("\r", 1)[-1] for line in ANSI_ESCAPES.sub("", text).splitlines()]
    return "\n".join(line for line in lines if line.strip())
