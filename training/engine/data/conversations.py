"""Convert the rows of a data file to token ids and labels. It needs a tokenizer, but no model and
no batches.

A row is `{"messages": [{"role", "content"}, ...]}`, optionally with `tools`, or `{"text": ...}`. In
a conversation the assistant's tokens and the end-of-turn token are trained; all others are masked
with IGNORE_INDEX, unless `train_on_prompt` is set. A message with `"weight": 0` is never trained.
Plain text is trained completely, without a template.
"""

from __future__ import annotations

import json
import re
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import TemplateError
from numpy.typing import NDArray

from training.engine.data.errors import DataError, TemplateTooSlow
from training.engine.data.render_limit import (
    MAX_ROW_SECONDS,
    RenderLimitExceeded,
    limit_render,
    limit_time,
)
from training.engine.data.template_checks import check_template_keeps_row

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

# Where a chat template may read the reasoning of a message, the usual name first
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
# What the code of a template may raise
TEMPLATE_ERRORS = (
    TemplateError,
    TypeError,
    ValueError,
    LookupError,
    ArithmeticError,
    AttributeError,
    RecursionError,
)
# A private character of Unicode in place of a special token's first character
ESCAPE = chr(0xF0000)

Message = dict[str, Any]
Row = dict[str, Any]


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


def ends_with_answer(row: Row) -> bool:
    """Whether the last message of a conversation is an answer that is trained."""
    return "messages" in row and is_trained(row["messages"][-1])


def is_trained(message: Message) -> bool:
    return bool(message["role"] == "assistant" and message.get("weight") != 0)


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
        DataError: the template rejects the row (for example, Gemma's has no system role), or
            exceeds the limits of `render_limit`.
    """
    messages, tools = prepare_messages(tokenizer, row["messages"][:message_count]), row.get("tools")
    try:
        with limit_render():
            return str(
                tokenizer.apply_chat_template(
                    messages,
                    tools=tools,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                )
            )
    except (RenderLimitExceeded, MemoryError) as error:
        raise TemplateTooSlow from error
    except TEMPLATE_ERRORS as error:
        raise DataError(
            "The model's chat template rejects the messages: "
            f"{str(error)[:200] or type(error).__name__}.",
            field="messages",
            code="template_error",
        ) from error


def prepare_messages(tokenizer: Any, messages: Sequence[Message]) -> list[Message]:
    """The messages as the chat template expects them: without `weight`, and with the reasoning
    under the key that the template reads.
    """
    prepared = []
    for message in messages:
        fields = {key: value for key, value in message.items() if key != "weight"}
        if "reasoning_content" in fields:
            reasoning = fields.pop("reasoning_content")
            if key := find_reasoning_key(tokenizer):
                fields[key] = reasoning
        prepared.append(fields)
    return prepared


def find_reasoning_key(tokenizer: Any) -> str:
    """The key of a message from which the chat template reads its reasoning: `thinking` in
    gpt-oss's, `reasoning_content` in Qwen 3's. Empty if the template reads none.
    """
    template = tokenizer.get_chat_template()
    return next((key for key in REASONING_KEYS if re.search(rf"\b{key}\b", template)), "")


def encode_prompt(tokenizer: Any, row: Row, message_count: int | None = None) -> list[int]:
    """Token ids of the first `message_count` messages (all if None) and the opening of the
    assistant turn that follows.
    """
    row = escape_special_tokens(tokenizer, row)
    text = render_messages(tokenizer, row, message_count=message_count, add_generation_prompt=True)
    return tokenize_rendered(tokenizer, text)[0]


def encode_messages(tokenizer: Any, row: Row) -> list[int]:
    """Token ids of the complete conversation."""
    row = escape_special_tokens(tokenizer, row)
    return tokenize_rendered(tokenizer, render_messages(tokenizer, row))[0]


def escape_special_tokens(tokenizer: Any, row: Row) -> Row:
    """The row with the first character of every special token in its content replaced by a private
    character, so that `tokenize_rendered` does not read the text of a user as a special token.
    """
    tokens = list_special_tokens(tokenizer)
    if not tokens:
        return row
    pattern = compile_alternatives(tokens)

    def escape_value(value: Any) -> Any:
        if isinstance(value, str):
            return pattern.sub(lambda match: ESCAPE + match[0][1:], value)
        if isinstance(value, dict):
            return {escape_value(key): escape_value(inner) for key, inner in value.items()}
        return [escape_value(inner) for inner in value] if isinstance(value, list) else value

    escaped: Row = escape_value(row)
    return escaped


def list_special_tokens(tokenizer: Any) -> tuple[str, ...]:
    """The special tokens of a tokenizer, the longest first."""
    added = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    tokens = {token for token in (*tokenizer.all_special_tokens, *added) if token.strip()}
    return tuple(sorted(tokens, key=lambda token: (-len(token), token)))


@lru_cache(maxsize=8)
def compile_alternatives(texts: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(re.escape(text) for text in texts))


def has_special_tokens(tokenizer: Any, text: str) -> bool:
    """Whether a text holds a special token of the tokenizer, as rendered conversations do."""
    tokens = list_special_tokens(tokenizer) if text else ()
    return bool(tokens) and compile_alternatives(tokens).search(text) is not None


def tokenize_rendered(tokenizer: Any, text: str) -> tuple[list[int], list[int]]:
    """Token ids of a rendered text, and the character at which each token starts. The text is
    tokenized in one piece, or in pieces that end inside the special tokens of the content.
    """
    cuts: list[int] = []
    if ESCAPE in text:
        endings = {ESCAPE + token[1:]: token for token in list_special_tokens(tokenizer)}
        pattern = compile_alternatives(tuple(endings))
        cuts = [match.start() + 1 for match in pattern.finditer(text)]
        text = pattern.sub(lambda match: endings[match[0]], text)
    ids: list[int] = []
    starts: list[int] = []
    for start, end in pairwise([0, *cuts, len(text)]):
        encoded = tokenizer(text[start:end], add_special_tokens=False, return_offsets_mapping=True)
        ids += encoded["input_ids"]
        starts += [start + offset for offset, _ in encoded["offset_mapping"]]
    return ids, starts


def find_assistant_spans(tokenizer: Any, row: Row) -> tuple[str, list[tuple[int, int]]]:
    """The text of the row, and the character span [start, end) of every assistant turn in it that
    is trained.

    A span includes the end-of-turn token, but not the whitespace after it, which is never
    generated. An assistant turn that opens the conversation has no prompt, so it has no span.

    Raises:
        DataError: the template renders earlier turns differently when later ones follow, so the
            spans are unknown; or it drops the reasoning that should be trained.
    """
    text = render_messages(tokenizer, row)
    spans = []
    for index, message in enumerate(row["messages"]):
        if is_trained(message) and index > 0:
            span = find_turn_span(tokenizer, row, text, index)
            check_reasoning(message, text[slice(*span)], index)
            spans.append(span)
    return text, spans


def find_turn_span(tokenizer: Any, row: Row, text: str, index: int) -> tuple[int, int]:
    prompt = render_messages(tokenizer, row, message_count=index, add_generation_prompt=True)
    is_last = index + 1 == len(row["messages"])
    answered = text if is_last else render_messages(tokenizer, row, message_count=index + 1)
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
    return len(prompt), len(answered.rstrip())


def check_reasoning_key(tokenizer: Any, row: Row) -> None:
    """Check that the template reads the reasoning of messages, if the row has any. It may leave out
    that of earlier turns, as Qwen 3's does.

    Raises:
        DataError: the template has no place for reasoning.
    """
    for index, message in enumerate(row["messages"]):
        if message.get("reasoning_content") and not find_reasoning_key(tokenizer):
            raise DataError(
                f"The model's chat template has no place for the reasoning of message {index + 1}. "
                "Use a model whose template supports reasoning, or remove the reasoning.",
                code="template_without_reasoning",
            )


def check_reasoning(message: Message, rendered: str, index: int) -> None:
    """Check that the rendered turn has the message's reasoning.

    Raises:
        DataError: the template drops it, so the model would learn to answer without it.
    """
    if message.get("reasoning_content", "").strip() not in rendered:
        raise DataError(
            f"The model's chat template drops the reasoning of message {index + 1}, so it cannot "
            "be trained. Use a model whose template supports reasoning, or remove the reasoning.",
            code="template_without_reasoning",
        )


def encode_row(
    tokenizer: Any, row: Row, *, max_length: int, train_on_prompt: bool = False
) -> EncodedRow:
    """Ids and labels of one row, truncated at `max_length` tokens.

    A token is trained if it starts inside an assistant span. The complete text is tokenized at
    once, as in generation. Plain text gets the tokenizer's BOS token, if it adds one, and its EOS
    token.

    Raises:
        DataError: the chat template rejects the row, or drops a part of it.
    """
    if "text" in row:
        ids = np.asarray(encode_text(tokenizer, row["text"]), dtype=np.int64)
        return EncodedRow(
            ids[:max_length],
            ids[:max_length].copy(),
            truncated_tokens=max(0, len(ids) - max_length),
        )
    try:
        with limit_time(MAX_ROW_SECONDS):
            return encode_conversation(
                tokenizer, row, max_length=max_length, train_on_prompt=train_on_prompt
            )
    except RenderLimitExceeded as error:
        raise TemplateTooSlow from error


def encode_conversation(
    tokenizer: Any, row: Row, *, max_length: int, train_on_prompt: bool
) -> EncodedRow:
    """`encode_row` for a conversation."""
    row = escape_special_tokens(tokenizer, row)
    check_reasoning_key(tokenizer, row)
    if train_on_prompt:
        text, spans = render_messages(tokenizer, row), [(0, 2**62)]
        if ends_with_answer(row):
            check_reasoning(row["messages"][-1], text, len(row["messages"]) - 1)
    else:
        text, spans = find_assistant_spans(tokenizer, row)
    answers = [i for i, message in enumerate(row["messages"]) if is_trained(message)]
    check_template_keeps_row(
        row,
        text,
        partial(render_messages, tokenizer),
        # Templates cut the reasoning out of earlier answers, which then have no span to train
        trained_indices=answers[-1:] if train_on_prompt else answers,
    )
    token_ids, token_starts = tokenize_rendered(tokenizer, text)
    ids, starts = np.asarray(token_ids, dtype=np.int64), np.asarray(token_starts, dtype=np.int64)
    is_in_span = np.zeros(len(ids), dtype=bool)
    for start, end in spans:
        is_in_span |= (starts >= start) & (starts < end)
    if train_on_prompt:
        for index, message in enumerate(row["messages"]):
            if message.get("weight") == 0:
                start, end = find_turn_span(tokenizer, row, text, index)
                is_in_span &= (starts < start) | (starts >= end)
    labels = np.where(is_in_span, ids, IGNORE_INDEX)
    return EncodedRow(
        ids[:max_length], labels[:max_length], truncated_tokens=max(0, len(ids) - max_length)
    )


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Token ids of plain text, between the tokenizer's BOS token, if it adds one, and its EOS
    token. Text that was rendered with the model's template already has them.
    """
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    bos_ids = get_bos_ids(tokenizer)
    if ids[:1] != bos_ids:
        ids = bos_ids + ids
    others = (tokenizer.unk_token, tokenizer.bos_token)
    endings = tuple(token for token in list_special_tokens(tokenizer) if token not in others)
    is_ended = text.rstrip().endswith(endings)
    if tokenizer.eos_token_id is not None and not is_ended:
        ids.append(tokenizer.eos_token_id)
    return ids


def get_bos_ids(tokenizer: Any) -> list[int]:
    """The BOS token that the tokenizer puts before a text, or an empty list."""
    ids = list(tokenizer("")["input_ids"])
    return ids[:1] if ids and ids[0] == tokenizer.bos_token_id else []


def encode_rows(
    tokenizer: Any,
    rows: Sequence[Row],
    *,
    max_length: int,
    train_on_prompt: bool,
    skip_invalid_rows: bool = False,
    excluded: Container[int] = (),
) -> Iterator[EncodedRow | None]:
    """Encode all rows in order; None for a row that is left out: its number is in `excluded`, or
    it cannot be encoded.

    Raises:
        DataError: a row cannot be encoded, and `skip_invalid_rows` is not set; the message starts
            with its number.
    """
    for number, row in enumerate(rows, start=1):
        if number in excluded:
            yield None
            continue
        try:
            yield encode_row(tokenizer, row, max_length=max_length, train_on_prompt=train_on_prompt)
        except DataError as error:
            if not skip_invalid_rows or isinstance(error, TemplateTooSlow):
                raise DataError(f"row {number}: {error.message}", code=error.code) from error
            yield None
