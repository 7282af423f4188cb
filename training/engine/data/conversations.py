"""Convert the rows of a data file to token ids and labels. It needs a tokenizer, but no model and
no batches.

A row is `{"messages": [{"role", "content"}, ...]}`, optionally with `tools`, or `{"text": ...}`. In
a conversation the assistant's tokens and the end-of-turn token are trained; all others are masked
with IGNORE_INDEX, unless `train_on_prompt` is set. Plain text is trained completely, without a
template.
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

IGNORE_INDEX = -100  # torch's cross entropy ignores this label

# For models without a chat template. It uses plain text only, so it adds no token to the
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
    """The data cannot be used to train this model."""


@dataclass(frozen=True)
class EncodedRow:
    """One row as the model sees it: `ids` and `labels`, both int64 of shape (tokens,)."""

    ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    truncated_tokens: int = 0  # Tokens beyond max_length

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def trained_tokens(self) -> int:
        """Number of tokens with a loss. The first token is never predicted."""
        return int((self.labels[1:] != IGNORE_INDEX).sum())


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer of a model folder, without torch. If it has no padding token, its
    end-of-text token is used.
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
    """Set DEFAULT_TEMPLATE if the tokenizer has no chat template. Returns `model` or `default`."""
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
    """Render the first `message_count` messages with the chat template. `add_generation_prompt`
    opens an assistant turn at the end.

    Raises:
        DataError: the template rejects the row. For example, Gemma's has no system role.
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
            "The model's chat template rejects this row: "
            f"{str(error)[:200] or type(error).__name__}.",
            code="template_error",
        ) from error


def encode_prompt(tokenizer: Any, row: Row, message_count: int | None = None) -> list[int]:
    """Token ids of the first `message_count` messages (all if None) and the opening of the
    assistant turn that follows.
    """
    text = render_messages(tokenizer, row, message_count=message_count, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def find_assistant_spans(tokenizer: Any, row: Row) -> tuple[str, list[tuple[int, int]]]:
    """The text of the row, and the character span [start, end) of every assistant turn in it.

    A span includes the end-of-turn token, but not the whitespace after it, which is never
    generated. An assistant turn that opens the conversation has no prompt, so it has no span.

    Raises:
        DataError: the template renders earlier turns differently when later ones follow, so the
            spans are unknown; or it drops the tool calls that should be trained.
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
                f"The model's chat template changes earlier turns (at message {index + 1}), so the "
                "answers cannot be separated from the prompt. Keep one answer per row, or set "
                "train_on_prompt.",
                code="template_rewrites_turns",
            )
        span = (len(prompt), len(answered.rstrip()))
        check_tool_calls(message, text[slice(*span)], index)
        spans.append(span)
    return text, spans


def check_tool_calls(message: Message, rendered: str, index: int) -> None:
    """Check that the rendered turn has the message's tool calls.

    Raises:
        DataError: the template drops them, so an empty answer would be trained.
    """
    for call in message.get("tool_calls", ()):
        name = call["function"]["name"]
        if name not in rendered:
            raise DataError(
                f"The model's chat template drops the tool call `{name[:80]}` (message "
                f"{index + 1}), so it cannot be trained. Use a model whose template supports "
                "tools, or write the call as text of the assistant.",
                code="template_without_tools",
            )


def encode_row(
    tokenizer: Any, row: Row, *, max_length: int, train_on_prompt: bool = False
) -> EncodedRow:
    """Ids and labels of one row, truncated at `max_length` tokens.

    A token is trained if it starts inside an assistant span. The complete text is tokenized at
    once, as in generation. Plain text gets the tokenizer's BOS token, if it adds one, and its EOS
    token.
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
    """The BOS token that the tokenizer puts before a text, or an empty list."""
    ids = list(tokenizer("")["input_ids"])
    return ids[:1] if ids and ids[0] == tokenizer.bos_token_id else []


def encode_rows(
    tokenizer: Any, rows: Sequence[Row], *, max_length: int, train_on_prompt: bool
) -> Iterator[EncodedRow]:
    """Encode all rows in order.

    Raises:
        DataError: a row cannot be encoded; the message starts with its number.
    """
    for number, row in enumerate(rows, start=1):
        try:
            yield encode_row(tokenizer, row, max_length=max_length, train_on_prompt=train_on_prompt)
        except DataError as error:
            raise DataError(f"row {number}: {error.message}", code=error.code) from error
