"""Rows of a data file -> token ids and labels. It knows neither batches nor the model, only a
tokenizer.

A row is `{"messages": [{"role", "content"}, ...]}`, with the `tools` that it may call, or `{"text":
...}`. Of a conversation the assistant's words and the mark that ends its turn are trained; all else
is masked with IGNORED, unless the prompt is to be learned too. Plain text is trained whole, without
a template.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import TemplateError
from numpy.typing import NDArray

from training.errors import UserError

IGNORE_INDEX = -100  # torch's cross entropy leaves this label out

# For models that bring no chat template: plain words, so that no token has to be added to the
# vocabulary.
DEFAULT_TEMPLATE = (
    "{% if tools %}{{ '### Tools:\n' + tools | tojson + '\n\n' }}{% endif %}{% for message in "
    "messages %}{{ '### ' + message['role'] | capitalize + ':\n' + message['content'] }}{% for "
    "call in message.get('tool_calls', []) %}{{ call['function'] | tojson }}{% endfor %}{% if "
    "message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n\n' }}{% endfor %}{% if "
    "add_generation_prompt %}{{ '### Assistant:\n' }}{% endif %}"
)

Message = dict[str, Any]
Row = dict[str, Any]


class DataError(UserError):
    """The data cannot be trained on with this model."""


@dataclass(frozen=True)
class EncodedRow:
    """One conversation as the model sees it: `ids` and `labels`, both int64 of shape (tokens,)."""

    ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    truncated_tokens: int = 0  # tokens lost to max_length

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def trained_tokens(self) -> int:
        """Tokens with a loss. The first token is never predicted."""
        return int((self.labels[1:] != IGNORE_INDEX).sum())


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder; needs no torch. One without a mark for padding pads with its
    end of text.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False
    )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def read_rows(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]


def ensure_chat_template(tokenizer: Any) -> str:
    """Make sure that the tokenizer has a chat template; says which one: `model` or `default`."""
    if tokenizer.chat_template:
        return "model"
    tokenizer.chat_template = DEFAULT_TEMPLATE
    return "default"


def render_messages(
    tokenizer: Any,
    row: Row,
    *,
    message_count: int | None = None,
    add_generation_prompt: bool = False,
) -> str:
    """The text of a row's first `upto` messages; `add_generation_prompt` opens an assistant's turn at its end.

    Raises:
        DataError: the template does not take such a row (Gemma's, for one, knows no system
            message).
    """
    messages, tools = row["messages"][:message_count], row.get("tools")
    try:
        return str(
            tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        )
    except (TemplateError, TypeError, ValueError, KeyError) as error:
        raise DataError(
            "This model's chat template refuses the row: "
            f"{str(error)[:200] or type(error).__name__}."
        ) from error


def encode_prompt(tokenizer: Any, row: Row, message_count: int | None = None) -> list[int]:
    """Token ids that ask the model for the assistant's turn after the first `upto` messages (after
    all of them if None).
    """
    text = render_messages(tokenizer, row, message_count=message_count, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def find_assistant_spans(tokenizer: Any, row: Row) -> tuple[str, list[tuple[int, int]]]:
    """The whole text, and for every assistant turn the characters [start, end) that it adds to its
    prompt.

    A span runs through the end-of-turn mark and not through the blank space after it, which is
    never generated. An opening turn of the assistant answers nothing, so it has no span.

    Raises:
        DataError: the template writes earlier turns differently once later ones follow, so that no
            span can be told; or it leaves out the tool calls that are to be learned.
    """
    text = render_messages(tokenizer, row)
    spans = []
    for index, message in enumerate(row["messages"]):
        if message["role"] != "assistant" or index == 0:
            continue
        prompt = render_messages(tokenizer, row, message_count=index, add_generation_prompt=True)
        answered = render_messages(tokenizer, row, message_count=index + 1)
        if not (
            text.startswith(prompt)
            and text.startswith(answered.rstrip())
            and len(answered) > len(prompt)
        ):
            raise DataError(
                f"This model's chat template rewrites earlier turns (seen at message {index + 1}), "
                "so the answers cannot be told from the prompt. Keep one answer per row, or "
                "switch on train_on_prompt."
            )
        span = (len(prompt), len(answered.rstrip()))
        check_tool_calls(message, text[slice(*span)], index)
        spans.append(span)
    return text, spans


def check_tool_calls(message: Message, rendered: str, index: int) -> None:
    """Raises DataError: the template knows no tools, so the call would be trained as an empty
    answer.
    """
    for call in message.get("tool_calls", ()):
        name = call["function"]["name"]
        if name not in rendered:
            raise DataError(
                f"This model's chat template leaves out the tool call `{name[:80]}` (message "
                f"{index + 1}); it cannot be learned. Choose a model whose template knows tools, "
                "or write the call as the assistant's text."
            )


def encode_row(
    tokenizer: Any, row: Row, *, max_length: int, train_on_prompt: bool = False
) -> EncodedRow:
    """Ids and labels of one row, cut off at `max_length` tokens.

    A token is trained if it begins inside an assistant's span. Tokens come from the whole text in
    one go, as in generation. Plain text begins with the tokenizer's first token, where it has one,
    and ends with its last.
    """
    if "text" in row:
        ids = np.asarray(
            [
                *get_bos_ids(tokenizer),
                *tokenizer(row["text"], add_special_tokens=False)["input_ids"],
            ],
            dtype=np.int64,
        )
        if tokenizer.eos_token_id is not None:
            ids = np.append(ids, tokenizer.eos_token_id)
        return EncodedRow(
            ids[:max_length],
            ids[:max_length].copy(),
            truncated_tokens=max(0, len(ids) - max_length),
        )
    if train_on_prompt:
        text, spans = render_messages(tokenizer, row), [(0, 2**62)]
    else:
        text, spans = find_assistant_spans(tokenizer, row)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = np.asarray(encoded["input_ids"], dtype=np.int64)
    starts = np.asarray([start for start, _ in encoded["offset_mapping"]], dtype=np.int64)
    is_trained = np.zeros(len(ids), dtype=bool)
    for start, end in spans:
        is_trained |= (starts >= start) & (starts < end)
    labels = np.where(is_trained, ids, IGNORE_INDEX)
    return EncodedRow(
        ids[:max_length], labels[:max_length], truncated_tokens=max(0, len(ids) - max_length)
    )


def get_bos_ids(tokenizer: Any) -> list[int]:
    """What the tokenizer itself puts before a text: nothing, or its beginning-of-text token."""
    ids = list(tokenizer("")["input_ids"])
    return ids[:1] if ids and ids[0] == tokenizer.bos_token_id else []


def encode_rows(
    tokenizer: Any, rows: Sequence[Row], *, max_length: int, train_on_prompt: bool
) -> Iterator[EncodedRow]:
    """Encode all rows in order.

    Raises:
        DataError: with the number of the row.
    """
    for number, row in enumerate(rows, start=1):
        try:
            yield encode_row(tokenizer, row, max_length=max_length, train_on_prompt=train_on_prompt)
        except DataError as error:
            raise DataError(f"row {number}: {error.message}") from error
