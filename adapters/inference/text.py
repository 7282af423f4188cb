"""From a question to token ids, and from an answer's ids to the text that may be sent. No queue
here, and no model runs.
"""

from __future__ import annotations

from adapters.inference.batch import ActiveSequence
from adapters.inference.loaded_model import LoadedModel
from adapters.inference.types import GenerationRequest
from training.engine.data.conversations import encode_prompt, get_bos_ids, render_messages

# Of an answer; a caller who says nothing gets this or what the model's context leaves
DEFAULT_MAX_TOKENS = 4096


class InvalidRequest(Exception):
    """The question itself is at fault; the message is for whoever asked."""


def encode_request(loaded_model: LoadedModel, request: GenerationRequest) -> list[int]:
    """Raises Unanswerable: nothing to answer. DataError: the model's template does not take such a
    conversation.
    """
    if request.prompt is not None:
        text_ids = loaded_model.tokenizer(request.prompt, add_special_tokens=False)["input_ids"]
        ids = [*get_bos_ids(loaded_model.tokenizer), *text_ids]
    elif request.needs_logprobs:  # the conversation as it stands, its last answer, too
        ids = list(
            loaded_model.tokenizer(
                render_messages(loaded_model.tokenizer, {"messages": request.messages}),
                add_special_tokens=False,
            )["input_ids"]
        )
    else:
        ids = encode_prompt(loaded_model.tokenizer, {"messages": request.messages})
    if not ids:
        raise InvalidRequest("The prompt is empty.")
    return ids


def resolve_max_tokens(
    loaded_model: LoadedModel, request: GenerationRequest, prompt_tokens: int
) -> int:
    """Raises Unanswerable: the model's context does not hold prompt and answer."""
    available_tokens = loaded_model.context_length - prompt_tokens
    wanted_tokens = (
        min(DEFAULT_MAX_TOKENS, max(1, available_tokens))
        if request.max_tokens is None
        else request.max_tokens
    )
    if wanted_tokens > available_tokens:
        raise InvalidRequest(
            f"This model's context holds {loaded_model.context_length:,} tokens; the prompt has {prompt_tokens:,} "
            f"and max_tokens asks for {wanted_tokens:,} more. Shorten one of them."
        )
    return wanted_tokens


def send_text(loaded_model: LoadedModel, sequence: ActiveSequence, *, is_final: bool) -> bool:
    """Send what is new and sure; True if a stop word ended the answer. What may become one is held
    back.
    """
    text = loaded_model.tokenizer.decode(sequence.ids, skip_special_tokens=True)
    stop_positions = [
        position
        for position in (text.find(word) for word in sequence.request.stop)
        if position >= 0
    ]
    is_stopped = bool(stop_positions)
    if is_stopped:
        text = text[: min(stop_positions)]
    elif not is_final:
        if text.endswith("\ufffd"):  # half a character: the next token completes it
            return False
        text = text[: len(text) - longest_stop_prefix(text, sequence.request.stop)]
    if len(text) > sequence.sent_chars:
        sequence.request.events.put({"text": text[sequence.sent_chars :]})
        sequence.sent_chars = len(text)
    return is_stopped


def longest_stop_prefix(text: str, stop_sequences: tuple[str, ...]) -> int:
    """Characters at the end of `text` with which one of the words may begin."""
    prefix_lengths = (
        size
        for word in stop_sequences
        for size in range(1, len(word))
        if text.endswith(word[:size])
    )
    return max(prefix_lengths, default=0)
