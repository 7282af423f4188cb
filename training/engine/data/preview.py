"""`python -m training.engine.data.preview`: tokenize rows as training does. It reads a JSON request
from stdin and writes the response to stdout.

A request with `rows` returns their tokens. A request with a `file` writes the token lengths of
every row, or of every `stride`-th one, to the file `into`. A model's chat template is third-party
code. It runs in this process under limits on time and memory, never in the web server.
"""

from __future__ import annotations

import json
import os
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from training.child_process import emit_message
from training.engine.data.conversations import (
    IGNORE_INDEX,
    EncodedRow,
    encode_row,
    ensure_chat_template,
    has_special_tokens,
    load_tokenizer,
)
from training.engine.data.errors import DataError, TemplateTooSlow
from training.errors import UserError, convert_panics, find_storage_error

NO_MAX_LENGTH = 10_000_000  # A max_length that truncates nothing
NO_TRAINED_TOKEN = 2**31 - 1  # "First trained token" of a row that has none
MAX_PREVIEW_TOKENS = 3_000
MAX_FAULTS = 100


def preview_row(tokenizer: Any, row: EncodedRow, max_length: int) -> dict[str, Any]:
    """Group the row's tokens into spans of one kind: t trained, m masked, c truncated."""
    is_trained = row.labels != IGNORE_INDEX
    spans: list[dict[str, Any]] = []
    ids = row.ids[:MAX_PREVIEW_TOKENS].tolist()
    for index, text in enumerate(decode_tokens(tokenizer, ids)):
        if index >= max_length:
            kind = "c"
        else:
            kind = "t" if is_trained[index] and index > 0 else "m"
        if not spans or spans[-1]["kind"] != kind:
            spans.append({"kind": kind, "tokens": []})
        spans[-1]["tokens"].append(text)
    trained = int((row.labels[1:max_length] != IGNORE_INDEX).sum())
    return {
        "tokens": len(row),
        "trained": trained,
        "spans": spans,
        "more": max(0, len(row) - MAX_PREVIEW_TOKENS),
    }


def decode_tokens(tokenizer: Any, ids: list[int]) -> list[str]:
    """The text of each token. A character that spans several tokens belongs to the last of
    them.
    """
    token_texts: list[str] = []
    pending: list[int] = []
    for token_id in ids:
        pending.append(token_id)
        text = tokenizer.decode(pending, clean_up_tokenization_spaces=False)
        is_complete = not text.endswith("\ufffd") or len(pending) > 4
        token_texts.append(text if is_complete else "")
        pending = [] if is_complete else pending
    return token_texts


def preview_rows(tokenizer: Any, request: dict[str, Any]) -> list[dict[str, Any]]:
    previews = []
    for row in request["rows"]:
        try:
            encoded = encode_row(
                tokenizer, row, max_length=NO_MAX_LENGTH, train_on_prompt=request["train_on_prompt"]
            )
            previews.append(preview_row(tokenizer, encoded, request["max_length"]))
        except TemplateTooSlow:
            raise
        except DataError as error:
            previews.append({"problem": error.message})
    return previews


def measure_lengths(tokenizer: Any, request: dict[str, Any]) -> dict[str, Any]:
    """Write int32 arrays to the file `into`, with one number per measured row.

    The arrays are `total` tokens, `trained` tokens, the position of the `first` trained token, and
    the trained tokens within each of `lengths` (`trained_512`). A row that the template cannot
    render counts as empty; `invalid` has the numbers of such rows, and the response the faults of
    the first ones.
    `special_token_rows` counts rows of plain text that hold special tokens of this model.
    """
    stride = request["stride"]
    names = ("total", "trained", "first", *(f"trained_{length}" for length in request["lengths"]))
    lengths: dict[str, list[int]] = {name: [] for name in names}
    faults: dict[int, str] = {}
    invalid_numbers: list[int] = []
    special_token_count = 0
    with Path(request["file"]).open(encoding="utf-8") as file:
        for line in islice(file, 0, None, stride):
            data_row = json.loads(line)
            special_token_count += has_special_tokens(tokenizer, data_row.get("text", ""))
            try:
                row = encode_row(
                    tokenizer,
                    data_row,
                    max_length=NO_MAX_LENGTH,
                    train_on_prompt=request["train_on_prompt"],
                )
            except DataError as error:
                if isinstance(error, TemplateTooSlow):
                    raise
                invalid_numbers.append(len(lengths["total"]) * stride + 1)
                if len(faults) < MAX_FAULTS:
                    faults[invalid_numbers[-1]] = error.message
                row = EncodedRow(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64))
            trained_positions = np.flatnonzero(row.labels[1:] != IGNORE_INDEX)
            lengths["total"].append(len(row))
            lengths["trained"].append(len(trained_positions))
            lengths["first"].append(
                int(trained_positions[0]) + 1 if len(trained_positions) else NO_TRAINED_TOKEN
            )
            for length in request["lengths"]:
                lengths[f"trained_{length}"].append(
                    int(np.searchsorted(trained_positions, length - 1))
                )
    temp_path = Path(request["into"]).with_suffix(f".{os.getpid()}.npz")
    arrays: dict[str, Any] = {
        name: np.asarray(values, dtype=np.int32)
        for name, values in (lengths | {"invalid": invalid_numbers}).items()
    }
    np.savez(temp_path, **arrays)
    temp_path.rename(request["into"])
    return {
        "read": len(lengths["total"]),
        "faults": faults,
        "special_token_rows": special_token_count,
    }


def handle_request(request: dict[str, Any]) -> dict[str, Any]:
    try:
        with convert_panics():
            tokenizer = load_tokenizer(Path(request["model"]))
            template = {"template": ensure_chat_template(tokenizer)}
            if "rows" in request:
                return template | {"rows": preview_rows(tokenizer, request)}
            return template | measure_lengths(tokenizer, request)
    except UserError as error:
        return {"error": error.message, "code": error.code}
    # A broken tokenizer or template becomes an error message on the page
    except Exception as error:  # noqa: BLE001
        storage_error = find_storage_error(error)
        if storage_error:
            return {"error": storage_error.message, "code": storage_error.code}
        return {
            "code": "tokenizer_failed",
            "error": f"The model's tokenizer failed on these rows ({type(error).__name__}: "
            f"{str(error)[:200]}).",
        }


def main() -> int:
    emit_message(**handle_request(json.load(sys.stdin)))
    return 0


if __name__ == "__main__":
    # The tokenizer needs no torch; without it the response takes 1.1 s instead of 2.3 s
    sys.modules["torch"] = None  # type: ignore[assignment]
    sys.exit(main())
