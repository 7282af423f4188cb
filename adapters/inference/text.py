"""Convert requests to token ids, and generated token ids to the text that may be sent."""

from __future__ import annotations

from adapters.inference.batch import ActiveSequence
from adapters.inference.loaded_model import LoadedModel
from adapters.inference.types import GenerationRequest
from training.engine.data.conversations import encode_messages, encode_prompt, get_bos_ids

# The default of max_tokens, limited by what the prompt leaves of the model's context
DEFAULT_MAX_TOKENS = 4096


class InvalidRequest(Exception):
    """The request cannot be answered. The message is for the client."""


def encode_request(loaded_model: LoadedModel, request: GenerationRequest) -> list[int]:
    """The token ids of the prompt or conversation.

    Raises:
        InvalidRequest: the prompt is empty.
        DataError: the chat template does not accept this conversation.
    """
    if request.prompt is not None:
        text_ids = loaded_model.tokenizer(request.prompt, add_special_tokens=False)["input_ids"]
        ids = [*get_bos_ids(loaded_model.tokenizer), *text_ids]
    elif request.needs_logprobs:  # the complete conversation, including its last answer
        ids = encode_messages(loaded_model.tokenizer, {"messages": request.messages})
    else:
        ids = encode_prompt(loaded_model.tokenizer, {"messages": request.messages})
    if not ids:
        raise InvalidRequest("The prompt is empty.")
    return ids


def resolve_max_tokens(
    loaded_model: LoadedModel, request: GenerationRequest, prompt_tokens: int
) -> int:
    """How many tokens to generate. Raises InvalidRequest: prompt and answer exceed the context."""
    available_tokens = loaded_model.context_length - prompt_tokens
    wanted_tokens = (
        min(DEFAULT_MAX_TOKENS, max(1, available_tokens))
        if request.max_tokens is None
        else request.max_tokens
    )
    if wanted_tokens > available_tokens:
        raise InvalidRequest(
            f"The model's context length is {loaded_model.context_length:,} tokens, but the prompt "
            f"has {prompt_tokens:,} and max_tokens is {wanted_tokens:,}. Reduce one of them."
        )
    return wanted_tokens


def send_text(loaded_model: LoadedModel, sequence: ActiveSequence, *, is_final: bool) -> bool:
    """Send the new text. Returns True if a stop sequence ended the answer.

    Text at the end that may become a stop sequence is sent later.
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
        if text.endswith("\ufffd"):  # an incomplete character: the next token completes it
            return False
        text = text[: len(text) - longest_stop_prefix(text, sequence.request.stop)]
    if len(text) > sequence.sent_chars:
        sequence.request.events.put({"text": text[sequence.sent_chars :]})
        sequence.sent_chars = len(text)
    return is_stopped


def longest_stop_prefix(text: str, stop_sequences: tuple[str, ...]) -> int:
    """Length of the longest end of `text` that is the start of a stop sequence."""
    prefix_lengths = (
        size
        for word in stop_sequences
        for size in range(1, len(word))
        if text.endswith(word[:size])
    )
    return max(prefix_lengths, default=0)
