"""Exact match: the trained model answers held-out prompts, and an answer counts if it is the
expected one to the character.

Done once, at the end, with the weights that are exported, greedily, and in the same way for every
technique.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from training.engine.data.conversations import IGNORED, DataError, EncodedRow, encode, prompt_ids
from training.engine.stop_signals import StopSignals
from training.engine.train.evaluate import evaluating
from training.engine.train.session import Event, Session

ROOM = 16  # tokens beyond the expected answer's: a longer one is wrong anyhow


def exact_match(session: Session, reins: StopSignals) -> Iterator[Event]:
    """Answer up to `exact_match_rows` held-out rows; plain text and rows that were cut off have no answer
    to compare.
    """
    asked = list(questions(session))
    if not asked:
        return
    began, right = time.monotonic(), 0
    for place, (prompt, expected) in enumerate(asked):
        if reins.requested_stop() is not None:
            return
        yield "phase", {"name": "comparing answers", "done": place, "total": len(asked)}
        right += answer(session, prompt, len(expected)) == words(session, expected)
    payload = {
        "step": session.step,
        "rows": len(asked),
        "matches": right,
        "exact_match": right / len(asked),
        "seconds": time.monotonic() - began,
    }
    yield "answers", payload


def questions(session: Session) -> Iterator[tuple[list[int], list[int]]]:
    """Prompt and expected answer as ids: the last turn of the assistant, end-of-turn mark
    included.
    """
    config = session.config
    for row in session.heldout_rows[: config.exact_match_rows]:
        if "text" in row or row["messages"][-1]["role"] != "assistant":
            continue
        try:
            encoded = encode(session.tokenizer, row, max_length=config.max_length)
        except (
            DataError
        ):  # a template whose answers cannot be told apart; such a run trains on prompts
            continue
        expected = last_answer(encoded)
        if expected and not encoded.cut:
            yield prompt_ids(session.tokenizer, row, len(row["messages"]) - 1), expected


def last_answer(row: EncodedRow) -> list[int]:
    trained = np.flatnonzero(row.labels != IGNORED)
    if not len(trained):
        return []
    gaps = np.flatnonzero(np.diff(trained) > 1)
    first = trained[gaps[-1] + 1] if len(gaps) else trained[0]
    found: list[int] = row.ids[first : trained[-1] + 1].tolist()
    return found


def answer(session: Session, prompt: list[int], expected: int) -> str:
    ids = torch.tensor([prompt], device=session.device)
    with evaluating(session.model):
        output = session.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=expected + ROOM,
            do_sample=False,
            pad_token_id=session.tokenizer.pad_token_id,
        )
    return words(session, output[0, ids.shape[1] :])


def words(session: Session, ids: Any) -> str:
    return str(session.tokenizer.decode(ids, skip_special_tokens=True)).strip()
