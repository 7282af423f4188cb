"""Held-out loss and one sampled answer. Neither draws a random number, so measuring does not change
what is learned.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from training.engine.batches import Batch, batch_sequences, split_batch
from training.engine.data.conversations import IGNORED, EncodedRow, prompt_ids, start_ids
from training.engine.train.session import Event, Session

SAMPLE_TOKENS = 64
SAMPLE_CHARACTERS = 2_000
MOST_TRIED = 20  # prompts that are looked at for one that is short enough


def collate(
    batch: Batch, rows: Sequence[EncodedRow], pad_id: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Ids and labels of shape (sequences, longest sequence), padded on the right, and their
    positions if rows are packed.

    Positions that begin anew tell transformers' causal mask where another row begins. The first
    token of a row follows on nothing, so it has no label.
    """
    longest = max(sum(len(rows[i]) for i in packed) for packed in batch)
    ids = torch.full((len(batch), longest), pad_id, dtype=torch.long)
    labels = torch.full((len(batch), longest), IGNORED, dtype=torch.long)
    positions = torch.zeros((len(batch), longest), dtype=torch.long)
    for place, packed in enumerate(batch):
        at = 0
        for row in (rows[i] for i in packed):
            ids[place, at : at + len(row)] = torch.from_numpy(row.ids)
            labels[place, at + 1 : at + len(row)] = torch.from_numpy(row.labels[1:])
            positions[place, at:] = torch.arange(longest - at)
            at += len(row)
    several = any(len(packed) > 1 for packed in batch)
    return ids.to(device), labels.to(device), positions.to(device) if several else None


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Eval mode without gradients; training mode comes back at the end."""
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train()


def heldout(session: Session) -> Iterator[Event]:
    """Mean loss per trained token over the held-out rows; remembers the best."""
    if not session.heldout:
        return
    yield "phase", {"name": "evaluating"}
    began = time.monotonic()
    order = sorted(range(len(session.heldout)), key=lambda i: len(session.heldout[i]))
    filled = batch_sequences([(len(session.heldout[row]), (row,)) for row in order], session.config)
    batches = [part for batch in filled for part in split_batch(batch, session.config.micro_batch_splits)]
    total = 0.0
    with evaluating(session.model):
        for batch in batches:
            tensors = collate(
                batch, session.heldout, session.tokenizer.pad_token_id, session.device
            )
            total += session.head.compute_loss_sum(session.model, *tensors).item()
    loss = total / sum(row.trained for row in session.heldout)
    session.eval_loss, session.heldout_step = loss, session.step
    best = session.best_loss is None or loss < session.best_loss
    if best:
        session.best_loss, session.best_step = loss, session.step
    yield (
        "eval",
        {
            "step": session.step,
            "eval_loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),  # e^709 is the largest double
            "rows": len(session.heldout),
            "total_tokens": session.total_tokens,
            "seconds": time.monotonic() - began,
            "best": best,
        },
    )
    yield "memory", {"moment": "eval", "step": session.step, **session.meter.read()}


def sample(session: Session) -> Iterator[Event]:
    """The greedy answer to one held-out prompt, another one each time."""
    asked = sampled_row(session)
    if asked is None:
        return
    prompt_tokens, prompt, expected = asked
    ids = torch.tensor([prompt_tokens], device=session.device)
    with evaluating(session.model):
        output = session.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=SAMPLE_TOKENS,
            do_sample=False,
            pad_token_id=session.tokenizer.pad_token_id,
        )
    answer = session.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    yield "sample", {"step": session.step, "prompt": prompt, "expected": expected, "answer": answer}


def sampled_row(session: Session) -> tuple[list[int], str, str] | None:
    """Prompt ids, prompt and expected answer of the row whose turn it is; plain text is asked for
    its second half.

    A prompt longer than what is trained is passed over: no forecast holds it, and the model may
    have no positions for it.
    """
    answered = [
        row
        for row in session.heldout_rows
        if "text" in row or row["messages"][-1]["role"] == "assistant"
    ]
    most = longest_prompt(session)
    turn = session.step // session.config.eval_steps
    for place in range(turn, turn + min(len(answered), MOST_TRIED)):
        ids, prompt, expected = asked_of(session.tokenizer, answered[place % len(answered)])
        if "text" in answered[place % len(answered)]:
            ids = ids[-max(1, most) :]
        if len(ids) <= most:
            return ids, prompt, expected
    return None


def longest_prompt(session: Session) -> int:
    """Tokens that a prompt may have, so that an answer finds its positions behind it."""
    text = session.model.config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None) or 2**31
    return min(
        session.config.max_length, positions - SAMPLE_TOKENS - session.config.prepended_tokens
    )


def asked_of(tokenizer: Any, row: dict[str, Any]) -> tuple[list[int], str, str]:
    if "text" in row:
        half = max(1, len(row["text"]) // 2)
        begun, rest = row["text"][:half], row["text"][half:]
        return (
            [*start_ids(tokenizer), *tokenizer(begun, add_special_tokens=False)["input_ids"]],
            begun[-SAMPLE_CHARACTERS:],
            rest[:SAMPLE_CHARACTERS],
        )
    messages = row["messages"]
    asked = next((m["content"] for m in reversed(messages[:-1]) if m["role"] == "user"), "")
    calls = [
        json.dumps(call["function"], ensure_ascii=False)
        for call in messages[-1].get("tool_calls", ())
    ]
    return (
        prompt_ids(tokenizer, row, len(messages) - 1),
        asked,
        "\n".join([messages[-1]["content"], *calls]).strip(),
    )
