"""Rows of a data file -> token ids and labels. It knows neither batches nor the model, only a tokenizer.

A row is `{"messages": [{"role", "content"}, ...]}`. Trained are the assistant's words and the mark that ends its turn; all
else is masked with IGNORED, unless the prompt is to be learned too.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from training.errors import UserError

IGNORED = -100  # torch's cross entropy leaves this label out

# For models that bring no chat template: plain words, so that no token has to be added to the vocabulary.
DEFAULT_TEMPLATE = (
    "{% for message in messages %}{{ '### ' + message['role'] | capitalize + ':\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Assistant:\n' }}{% endif %}"
)

Message = dict[str, str]


class DataError(UserError):
    """The data cannot be trained on with this model."""


@dataclass(frozen=True)
class EncodedRow:
    """One conversation as the model sees it: `ids` and `labels`, both int64 of shape (tokens,)."""

    ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    cut: int = 0  # tokens lost to max_length

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def trained(self) -> int:
        """Tokens with a loss. The first token is never predicted."""
        return int((self.labels[1:] != IGNORED).sum())


def read_rows(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]


def use_template(tokenizer: Any) -> str:
    """Make sure that the tokenizer has a chat template; says which one: `model` or `default`."""
    if tokenizer.chat_template:
        return "model"
    tokenizer.chat_template = DEFAULT_TEMPLATE
    return "default"


def render(tokenizer: Any, messages: Sequence[Message], *, for_answer: bool = False) -> str:
    """The text of a conversation; `for_answer` opens an assistant's turn at its end."""
    return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=for_answer))


def prompt_ids(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """Token ids that ask the model for the next assistant turn."""
    text = render(tokenizer, messages, for_answer=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def assistant_spans(tokenizer: Any, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
    """The whole text, and for every assistant turn the characters [start, end) that it adds to its prompt.

    A span runs through the end-of-turn mark and not through the blank space after it, which is never generated.

    Raises:
        DataError: the template writes earlier turns differently once later ones follow, so that no span can be told.
    """
    whole = render(tokenizer, messages)
    spans = []
    for place, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = render(tokenizer, messages[:place], for_answer=True)
        upto = render(tokenizer, messages[: place + 1])
        if not (whole.startswith(before) and whole.startswith(upto.rstrip()) and len(upto) > len(before)):
            raise DataError(
                f"This model's chat template rewrites earlier turns (seen at message {place + 1}), so the answers cannot be "
                "told from the prompt. Keep one answer per row, or switch on train_on_prompt."
            )
        spans.append((len(before), len(upto.rstrip())))
    return whole, spans


def encode(tokenizer: Any, messages: Sequence[Message], *, max_length: int, train_on_prompt: bool = False) -> EncodedRow:
    """Ids and labels of one conversation, cut off at `max_length` tokens.

    A token is trained if it begins inside an assistant's span. Tokens come from the whole text in one go, as in generation.
    """
    if train_on_prompt:
        whole = render(tokenizer, messages)
        spans: list[tuple[int, int]] = []
    else:
        whole, spans = assistant_spans(tokenizer, messages)
    encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=not train_on_prompt)
    ids = np.asarray(encoded["input_ids"], dtype=np.int64)
    if train_on_prompt:
        labels = ids.copy()
    else:
        starts = np.asarray([start for start, _ in encoded["offset_mapping"]], dtype=np.int64)
        inside = np.zeros(len(ids), dtype=bool)
        for start, end in spans:
            inside |= (starts >= start) & (starts < end)
        labels = np.where(inside, ids, IGNORED)
    return EncodedRow(ids[:max_length], labels[:max_length], cut=max(0, len(ids) - max_length))


def encode_rows(
    tokenizer: Any, rows: Sequence[dict[str, Any]], *, max_length: int, train_on_prompt: bool
) -> Iterator[EncodedRow]:
    """Encode all rows in order.

    Raises:
        DataError: with the number of the row.
    """
    for number, row in enumerate(rows, start=1):
        try:
            yield encode(tokenizer, row["messages"], max_length=max_length, train_on_prompt=train_on_prompt)
        except DataError as error:
            raise DataError(f"row {number}: {error.message}") from error
