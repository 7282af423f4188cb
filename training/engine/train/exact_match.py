"""Exact match: the share of held-out prompts whose greedy answer equals the expected answer.

It is measured once at the end of a run, with the exported weights, the same way for every method.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from training.engine.data.conversations import (
    IGNORE_INDEX,
    EncodedRow,
    encode_prompt,
    encode_row,
    ends_with_answer,
)
from training.engine.data.errors import DataError
from training.engine.stop_requests import StopRequests
from training.engine.train.evaluate import eval_mode
from training.engine.train.session import Event, Session

MAX_EXTRA_TOKENS = 16  # Beyond the expected length; an answer that is longer is wrong anyway


def measure_exact_match(session: Session, stop_requests: StopRequests) -> Iterator[Event]:
    """Answer up to `exact_match_rows` held-out rows. Plain text and truncated rows are skipped:
    they have no complete expected answer.
    """
    prompts = list(iter_prompts(session))
    if not prompts:
        return
    began, matches = time.monotonic(), 0
    for index, (prompt, expected) in enumerate(prompts):
        if stop_requests.get_requested_stop() is not None:
            return
        yield "phase", {"name": "measuring exact match", "done": index, "total": len(prompts)}
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
    yield "exact_match", fields


def iter_prompts(session: Session) -> Iterator[tuple[list[int], list[int]]]:
    """Prompt ids and expected ids of each row. The expected ids are the last assistant turn with
    its end-of-turn token.
    """
    config = session.config
    for row in session.raw_eval_rows[: config.exact_match_rows]:
        if not ends_with_answer(row):
            continue
        try:
            encoded = encode_row(session.tokenizer, row, max_length=config.max_length)
        except DataError:
            # The template does not separate answers from prompts; such a run uses train_on_prompt
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
