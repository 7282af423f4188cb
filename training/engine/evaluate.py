"""Held-out loss and one sampled answer. Neither draws a random number, so measuring does not change what is learned."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from training.engine.batches import fill
from training.engine.conversations import IGNORED, EncodedRow, prompt_ids
from training.engine.session import Event, Session

SAMPLE_TOKENS = 64


def collate(rows: list[EncodedRow], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and labels of shape (rows, longest row), padded on the right."""
    longest = max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), pad_id, dtype=torch.long)
    labels = torch.full((len(rows), longest), IGNORED, dtype=torch.long)
    for place, row in enumerate(rows):
        ids[place, : len(row)] = torch.from_numpy(row.ids)
        labels[place, : len(row)] = torch.from_numpy(row.labels)
    return ids.to(device), labels.to(device)


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
    batches = fill(order, [len(row) for row in session.heldout], session.config.tokens_per_batch)
    total = 0.0
    with evaluating(session.model):
        for batch in batches:
            rows = [session.heldout[i] for i in batch]
            ids, labels = collate(rows, session.tokenizer.pad_token_id, session.device)
            total += session.head.loss_sum(session.model, ids, labels).item()
    loss = total / sum(row.trained for row in session.heldout)
    session.heldout_loss, session.heldout_step = loss, session.step
    best = session.best_loss is None or loss < session.best_loss
    if best:
        session.best_loss, session.best_step = loss, session.step
    yield (
        "eval",
        {
            "step": session.step,
            "heldout_loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),  # e^709 is the largest double
            "rows": len(session.heldout),
            "seconds": time.monotonic() - began,
            "best": best,
        },
    )
    yield "memory", {"moment": "eval", "step": session.step, **session.meter.read()}


def sample(session: Session) -> Iterator[Event]:
    """The greedy answer to one held-out prompt, another one each time."""
    answered = [m for m in session.heldout_messages if m[-1]["role"] == "assistant"]
    if not answered:
        return
    messages = answered[session.step // session.config.eval_interval % len(answered)]
    ids = torch.tensor([prompt_ids(session.tokenizer, messages[:-1])], device=session.device)
    with evaluating(session.model):
        output = session.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=SAMPLE_TOKENS,
            do_sample=False,
            pad_token_id=session.tokenizer.pad_token_id,
        )
    answer = session.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    asked = next((m["content"] for m in reversed(messages[:-1]) if m["role"] == "user"), "")
    yield (
        "sample",
        {"step": session.step, "prompt": asked, "expected": messages[-1]["content"], "answer": answer},
    )
