"""`python -m training.engine.data.preview`: rows as a model will see them, without training. A
request on stdin, an answer on stdout.

`rows` come back token by token; of a `file` the lengths of up to `most_rows` rows, spread evenly
over it, are written to `into`. The template of a model is code that somebody wrote: it runs here
under limits on time and memory, never in the web server.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from training.child_process import emit
from training.engine.data.conversations import (
    IGNORED,
    DataError,
    EncodedRow,
    encode,
    load_tokenizer,
    use_template,
)
from training.errors import UserError

MOST_MEMORY_BYTES = 6 * 2**30  # address space
MOST_SECONDS = {"look": 20, "measure": 120}
WHOLE = 10_000_000  # a length that cuts nothing off
NEVER = 2**31 - 1  # the place of the first trained token where there is none
SHOWN_TOKENS = 3_000


def shown(tokenizer: Any, row: EncodedRow, max_length: int) -> dict[str, Any]:
    """Text and fate of every token: t trained, m masked, c cut off; tokens of one fate in a row are
    one piece.
    """
    starts = row.labels != IGNORED
    pieces: list[dict[str, Any]] = []
    ids = row.ids[:SHOWN_TOKENS].tolist()
    for place, text in enumerate(texts(tokenizer, ids)):
        if place >= max_length:
            fate = "c"
        else:
            fate = "t" if starts[place] and place > 0 else "m"
        if not pieces or pieces[-1]["fate"] != fate:
            pieces.append({"fate": fate, "tokens": []})
        pieces[-1]["tokens"].append(text)
    trained = int((row.labels[1:max_length] != IGNORED).sum())
    return {
        "tokens": len(row),
        "trained": trained,
        "pieces": pieces,
        "more": max(0, len(row) - SHOWN_TOKENS),
    }


def texts(tokenizer: Any, ids: list[int]) -> list[str]:
    """The text of each token. A character that several tokens share is shown at the last of
    them.
    """
    found: list[str] = []
    held: list[int] = []
    for one in ids:
        held.append(one)
        text = tokenizer.decode(held, clean_up_tokenization_spaces=False)
        whole = not text.endswith("\ufffd") or len(held) > 4
        found.append(text if whole else "")
        held = [] if whole else held
    return found


def look(tokenizer: Any, request: dict[str, Any]) -> list[dict[str, Any]]:
    answers = []
    for row in request["rows"]:
        try:
            encoded = encode(
                tokenizer, row, max_length=WHOLE, train_on_prompt=request["train_on_prompt"]
            )
            answers.append(shown(tokenizer, encoded, request["max_length"]))
        except DataError as error:
            answers.append({"problem": error.message})
    return answers


def measure(tokenizer: Any, request: dict[str, Any]) -> dict[str, Any]:
    """Write int32 arrays to `into`, a number a row: all tokens, trained ones (in all, and before
    each of `lengths`), the first.

    A row whose answers the model's template cannot tell has none; the first such fault is told.
    """
    count, most = request["count"], request["most_rows"]
    every = -(-count // most)
    names = ("total", "trained", "first", *(f"trained_{length}" for length in request["lengths"]))
    lengths: dict[str, list[int]] = {name: [] for name in names}
    fault = ""
    with Path(request["file"]).open(encoding="utf-8") as file:
        for line in islice(file, 0, None, every):
            try:
                row = encode(
                    tokenizer,
                    json.loads(line),
                    max_length=WHOLE,
                    train_on_prompt=request["train_on_prompt"],
                )
            except DataError as error:
                fault = fault or f"row {len(lengths['total']) * every + 1}: {error.message}"
                row = EncodedRow(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64))
            places = np.flatnonzero(row.labels[1:] != IGNORED)
            lengths["total"].append(len(row))
            lengths["trained"].append(len(places))
            lengths["first"].append(int(places[0]) + 1 if len(places) else NEVER)
            for length in request["lengths"]:
                lengths[f"trained_{length}"].append(int(np.searchsorted(places, length - 1)))
    aside = Path(request["into"]).with_suffix(f".{os.getpid()}.npz")
    arrays: dict[str, Any] = {
        name: np.asarray(values, dtype=np.int32) for name, values in lengths.items()
    }
    np.savez(aside, **arrays)
    aside.rename(request["into"])
    return {"read": len(lengths["total"]), "fault": fault}


def answer(request: dict[str, Any]) -> dict[str, Any]:
    try:
        tokenizer = load_tokenizer(Path(request["model"]))
        template = {"template": use_template(tokenizer)}
        if "rows" in request:
            return template | {"rows": look(tokenizer, request)}
        return template | measure(tokenizer, request)
    except UserError as error:
        return {"error": error.message}
    # a broken tokenizer or template of the model becomes a sentence on the page
    except Exception as error:  # noqa: BLE001
        return {
            "error": f"This model cannot read the rows ({type(error).__name__}: "
            f"{str(error)[:200]})."
        }


def main() -> int:
    resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY_BYTES, MOST_MEMORY_BYTES))
    request = json.load(sys.stdin)
    seconds = MOST_SECONDS["look" if "rows" in request else "measure"]
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    emit(**answer(request))
    return 0


if __name__ == "__main__":
    # a tokenizer needs none: an answer in 1.1 s instead of 2.3
    sys.modules["torch"] = None  # type: ignore[assignment]
    sys.exit(main())
