"""Held-out loss and one sample answer. Neither draws random numbers, so evaluation does not change
training.
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
from training.engine.data.conversations import (
    IGNORE_INDEX,
    EncodedRow,
    encode_prompt,
    ends_with_answer,
    get_bos_ids,
)
from training.engine.train.session import Event, Session

MAX_SAMPLE_TOKENS = 64
MAX_SAMPLE_CHARACTERS = 2_000
MAX_PROMPTS_TRIED = 20  # Prompts checked in search of one that is short enough


def collate(
    batch: Batch, rows: Sequence[EncodedRow], pad_id: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Build ids and labels of shape (sequences, longest sequence), padded on the right, and
    position ids if rows are packed.

    Position ids restart at 0 with each packed row; transformers' causal mask separates the rows by
    that. The first token of a row has no context, so it has no label.
    """
    longest = max(sum(len(rows[i]) for i in packed) for packed in batch)
    ids = torch.full((len(batch), longest), pad_id, dtype=torch.long)
    labels = torch.full((len(batch), longest), IGNORE_INDEX, dtype=torch.long)
    positions = torch.zeros((len(batch), longest), dtype=torch.long)
    for index, packed in enumerate(batch):
        offset = 0
        for row in (rows[i] for i in packed):
            ids[index, offset : offset + len(row)] = torch.from_numpy(row.ids)
            labels[index, offset + 1 : offset + len(row)] = torch.from_numpy(row.labels[1:])
            positions[index, offset:] = torch.arange(longest - offset)
            offset += len(row)
    is_packed = any(len(packed) > 1 for packed in batch)
    return ids.to(device), labels.to(device), positions.to(device) if is_packed else None


@contextmanager
def eval_mode(model: Any) -> Iterator[None]:
    """Switch the model to eval mode without gradients, and back to training mode at the end."""
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train()


def evaluate_loss(session: Session) -> Iterator[Event]:
    """Measure the mean loss per trained token over the held-out rows, and track the best step."""
    if not session.eval_rows:
        return
    yield "phase", {"name": "evaluating"}
    began = time.monotonic()
    order = sorted(range(len(session.eval_rows)), key=lambda i: len(session.eval_rows[i]))
    unsplit_batches = batch_sequences(
        [(len(session.eval_rows[row]), (row,)) for row in order], session.config
    )
    batches = [
        part
        for batch in unsplit_batches
        for part in split_batch(batch, session.config.micro_batch_splits)
    ]
    total = 0.0
    with eval_mode(session.model):
        for batch in batches:
            tensors = collate(
                batch, session.eval_rows, session.tokenizer.pad_token_id, session.device
            )
            total += session.head.compute_loss_sum(session.model, *tensors).item()
    loss = total / sum(row.trained_tokens for row in session.eval_rows)
    session.eval_loss, session.last_eval_step = loss, session.step
    is_best = session.best_loss is None or loss < session.best_loss
    if is_best:
        session.best_loss, session.best_step = loss, session.step
    yield (
        "eval",
        {
            "step": session.step,
            "eval_loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),  # e^710 overflows a double
            "rows": len(session.eval_rows),
            "total_tokens": session.total_tokens,
            "seconds": time.monotonic() - began,
            "best": is_best,
        },
    )
    yield "memory", {"moment": "eval", "step": session.step, **session.meter.read_memory()}


def generate_sample(session: Session) -> Iterator[Event]:
    """Answer one held-out prompt greedily. Each call takes the next prompt."""
    example = draw_sample(session)
    if example is None:
        return
    prompt_tokens, prompt, expected = example
    ids = torch.tensor([prompt_tokens], device=session.device)
    with eval_mode(session.model):
        output = session.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=MAX_SAMPLE_TOKENS,
            do_sample=False,
            pad_token_id=session.tokenizer.pad_token_id,
        )
    answer = session.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    yield "sample", {"step": session.step, "prompt": prompt, "expected": expected, "answer": answer}


def draw_sample(session: Session) -> tuple[list[int], str, str] | None:
    """Prompt ids, prompt and expected answer of the next row. For plain text the prompt is the
    first half and the expected answer the second.

    Prompts that are too long are skipped: the memory forecast does not cover them, and the model
    may have no positions for them.
    """
    answered_rows = [row for row in session.raw_eval_rows if "text" in row or ends_with_answer(row)]
    max_tokens = compute_max_prompt_tokens(session)
    first = session.step // session.config.eval_steps
    for index in range(first, first + min(len(answered_rows), MAX_PROMPTS_TRIED)):
        ids, prompt, expected = build_sample_prompt(
            session.tokenizer, answered_rows[index % len(answered_rows)]
        )
        if "text" in answered_rows[index % len(answered_rows)]:
            ids = ids[-max(1, max_tokens) :]
        if len(ids) <= max_tokens:
            return ids, prompt, expected
    return None


def compute_max_prompt_tokens(session: Session) -> int:
    """The longest prompt that leaves positions for the answer."""
    text_config = session.model.config.get_text_config()
    positions = getattr(text_config, "max_position_embeddings", None) or 2**31
    return min(
        session.config.max_length, positions - MAX_SAMPLE_TOKENS - session.config.prepended_tokens
    )


def build_sample_prompt(tokenizer: Any, row: dict[str, Any]) -> tuple[list[int], str, str]:
    if "text" in row:
        middle = max(1, len(row["text"]) // 2)
        beginning, rest = row["text"][:middle], row["text"][middle:]
        return (
            [*get_bos_ids(tokenizer), *tokenizer(beginning, add_special_tokens=False)["input_ids"]],
            beginning[-MAX_SAMPLE_CHARACTERS:],
            rest[:MAX_SAMPLE_CHARACTERS],
        )
    messages = row["messages"]
    user_message = next((m["content"] for m in reversed(messages[:-1]) if m["role"] == "user"), "")
    calls = [
        json.dumps(call["function"], ensure_ascii=False)
        for call in messages[-1].get("tool_calls", ())
    ]
    return (
        encode_prompt(tokenizer, row, len(messages) - 1),
        user_message,
        "\n".join([messages[-1]["content"], *calls]).strip(),
    )
