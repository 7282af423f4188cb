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

from training.engine.data.conversations import (
    IGNORE_INDEX,
    DataError,
    EncodedRow,
    encode_prompt,
    encode_row,
)
from training.engine.stop_signals import StopSignals
from training.engine.train.evaluate import eval_mode
from training.engine.train.session import Event, Session

MAX_EXTRA_TOKENS = 16  # tokens beyond the expected answer's: a longer one is wrong anyhow


def measure_exact_match(session: Session, stop_signals: StopSignals) -> Iterator[Event]:
    """Answer up to `exact_match_rows` held-out rows; plain text and rows that were cut off have no answer
    to compare.
    """
    prompts = list(iter_prompts(session))
    if not prompts:
        return
    began, matches = time.monotonic(), 0
    for index, (prompt, expected) in enumerate(prompts):
        if stop_signals.requested_stop() is not None:
            return
        yield "phase", {"name": "comparing answers", "done": index, "total": len(prompts)}
        matches += generate_answer(session, prompt, len(expected)) == decode_answer(
            session, expected
        )
    fields = {
        "step": session.step,
        "rows": len(prompts),
        "matches": matches,
        "exact_match": matches / len(prompts),
        "seconds": time.monotonic() - began,
    }
    yield "answers", fields


def iter_prompts(session: Session) -> Iterator[tuple[list[int], list[int]]]:
    """Prompt and expected answer as ids: the last turn of the assistant, end-of-turn mark
    included.
    """
    config = session.config
    for row in session.raw_eval_rows[: config.exact_match_rows]:
        if "text" in row or row["messages"][-1]["role"] != "assistant":
            continue
        try:
            encoded = encode_row(session.tokenizer, row, max_length=config.max_length)
        except (
            DataError
        ):  # a template whose answers cannot be told apart; such a run trains on prompts
            continue
        expected = find_last_answer(encoded)
        if expected and not encoded.truncated_tokens:
            yield encode_prompt(session.tokenizer, row, len(row["messages"]) - 1), expected


def find_last_answer(row: EncodedRow) -> list[int]:
    trained_positions = np.flatnonzero(row.labels != IGNORE_INDEX)
    if not len(trained_positions):
        return []
    gaps = np.flatnonzero(np.diff(trained_positions) > 1)
    first = trained_positions[gaps[-1] + 1] if len(gaps) else trained_positions[0]
    answer_ids: list[int] = row.ids[first : trained_positions[-1] + 1].tolist()
    return answer_ids


def generate_answer(session: Session, prompt: list[int], expected_tokens: int) -> str:
    ids = torch.tensor([prompt], device=session.device)
    with eval_mode(session.model):
        output = session.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=expected_tokens + MAX_EXTRA_TOKENS,
            do_sample=False,
            pad_token_id=session.tokenizer.pad_token_id,
        )
    return decode_answer(session, output[0, ids.shape[1] :])


def decode_answer(session: Session, ids: Any) -> str:
    return str(session.tokenizer.decode(ids, skip_special_tokens=True)).strip()
