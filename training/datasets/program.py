"""`python -m training.datasets.program check|save|fetch FOLDER`: the work on an upload, in a process of its own.

Untrusted files are read here and nowhere else, under a limit on memory. FOLDER/order.json says what to do; progress and the
result are JSON lines on stdout. It knows no Django.
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path
from typing import Any

from training.datasets.build import Choices, build
from training.datasets.check import Source, check
from training.datasets.formats import Format
from training.datasets.forms import Mapped
from training.errors import UserError

# Address space, of which a check of 2 GiB uses a tenth; what is left over is maps that are never touched.
MOST_MEMORY_BYTES = 4 * 2**30


def say(**words: Any) -> None:
    sys.stdout.write(json.dumps(words) + "\n")
    sys.stdout.flush()


def tell(done: float, words: str) -> None:
    say(done=done, words=words)


def run_check(folder: Path, order: dict[str, Any]) -> None:
    sources = [
        Source(folder / file["file"], Format(**file["format"]), file.get("split", ""), file["name"]) for file in order["files"]
    ]
    mapped = Mapped.from_dict(order["mapped"])
    say(report=check(sources, mapped, folder, most_bytes=order["most_bytes"], tell=tell))


def run_save(folder: Path, order: dict[str, Any]) -> None:
    tell(0.0, "writing")
    say(built=build(folder, Choices(**order["choices"]), Path(order["root"])))


def run_fetch(folder: Path, order: dict[str, Any]) -> None:
    from training.datasets.hub import fetch

    say(files=fetch(order["hub_id"], folder, most_bytes=order["most_bytes"], tell=tell))


ACTS = {"check": run_check, "save": run_save, "fetch": run_fetch}


def main(act: str, folder: Path) -> int:
    resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY_BYTES, MOST_MEMORY_BYTES))
    try:
        ACTS[act](folder, json.loads((folder / "order.json").read_text()))
    except UserError as error:
        say(error=error.message, field=error.field)
        return 1
    except MemoryError:
        say(error="The file needs more memory than a check may take; split it.", field="file")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
