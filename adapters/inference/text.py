"""Convert requests to token ids, and generated token ids to the text that may be sent."""

from __future__ import annotations

from functools import partial
from typing import Any

from adapters.inference.answer_format import (
    AnswerFormat,
    CallFormat,
    hold_back,
    is_reasoning_open,
    parse_answer,
)
from adapters.inference.batch import ActiveSequence
from adapters.inference.loaded_model import LoadedModel
from adapters.inference.types import GenerationRequest
from training.engine.data.conversations import (
    encode_messages,
    encode_prompt,
    get_bos_ids,
    render_messages,
)
from training.engine.data.template_checks import check_template_keeps_row

# The default of max_tokens, limited by what the prompt leaves of the model's context
DEFAULT_MAX_TOKENS = 4096


class InvalidRequest(Exception):
    """The request cannot be answered. The message is for the client; `param` is the field, and
    `code` the reason.
    """

    def __init__(self, message: str, *, param: str = "", code: str = "") -> None:
        super().__init__(message)
        self.param = param
        self.code = code


def encode_request(loaded_model: LoadedModel, request: GenerationRequest) -> list[int]:
    """The token ids of the prompt or conversation. Sets the request's `answer_format`.

    Raises:
        InvalidRequest: the prompt is empty, or the chat template supports no tools.
        DataError: the chat template does not accept this conversation, or drops a part of it.
    """
    tokenizer = loaded_model.tokenizer
    if request.prompt is not None:
        text_ids = tokenizer(request.prompt, add_special_tokens=False)["input_ids"]
        ids = [*get_bos_ids(tokenizer), *text_ids]
    elif request.needs_logprobs:  # the complete conversation, including its last answer
        ids = encode_messages(tokenizer, {"messages": request.messages})
    else:
        row: dict[str, Any] = {"messages": request.messages}
        if request.tools:
            row["tools"] = request.tools
        render = partial(render_messages, tokenizer, add_generation_prompt=True)
        rendered = render(row)
        check_template_keeps_row(row, rendered, render)
        request.answer_format = build_answer_format(loaded_model, request, rendered)
        prefix_ids = tokenizer(request.answer_format.prefix, add_special_tokens=False)["input_ids"]
        ids = [*encode_prompt(tokenizer, row), *prefix_ids]
    if not ids:
        raise InvalidRequest("The prompt is empty.")
    return ids


def build_answer_format(
    loaded_model: LoadedModel, request: GenerationRequest, rendered: str
) -> AnswerFormat:
    """What to look for in the answer to a conversation, which the chat template `rendered`.

    Raises:
        InvalidRequest: the chat template supports no tools.
    """
    tags = loaded_model.reasoning_tags
    is_reasoning = tags is not None and is_reasoning_open(rendered, tags)
    calls = get_call_format(loaded_model) if request.tools else None
    prefix = ""
    if calls and request.forced_tool is not None:
        prefix = calls.get_prefix(request.forced_tool)
        prefix = f"\n{tags[1]}\n\n{prefix}" if tags and is_reasoning else prefix
    return AnswerFormat(
        reasoning_tags=tags,
        is_reasoning=is_reasoning,
        calls=calls,
        tools=tuple(request.tools),
        prefix=prefix,
        max_calls=request.max_calls,
    )


def get_call_format(loaded_model: LoadedModel) -> CallFormat:
    """Raises InvalidRequest: the chat template writes no calls, or none that can be read."""
    calls = loaded_model.call_format
    if calls is None:
        raise InvalidRequest(
            "The model's chat template does not support tools. Leave tools out, or use a model "
            "whose chat template supports them.",
            param="tools",
            code="template_without_tools",
        )
    return calls


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
            f"has {prompt_tokens:,} and max_tokens is {wanted_tokens:,}. Reduce one of them.",
            param="messages" if request.prompt is None else "prompt",
            code="context_length_exceeded",
        )
    return wanted_tokens


def get_dropped_ids(loaded_model: LoadedModel, answer_format: AnswerFormat) -> frozenset[int]:
    """The special tokens that are left out of the text: all but those that mark reasoning and tool
    calls.
    """
    tags = "".join(answer_format.tags)
    return frozenset(
        token_id for token_id, text in loaded_model.special_tokens.items() if text not in tags
    )


def send_text(loaded_model: LoadedModel, sequence: ActiveSequence, *, is_final: bool) -> bool:
    """Send the new text, reasoning and tool calls. Returns True if a stop sequence ended the
    answer.

    Text at the end that may become a stop sequence, a tag or a tool call is sent later.
    """
    answer_format = sequence.request.answer_format
    ids = [token for token in sequence.ids if token not in sequence.dropped_ids]
    text = loaded_model.tokenizer.decode(ids)
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
        text = hold_back(text, sequence.request.stop)
    send_answer(sequence, answer_format.prefix + text, is_final=is_final or is_stopped)
    return is_stopped


def send_answer(sequence: ActiveSequence, text: str, *, is_final: bool) -> None:
    """Send what is new in the answer."""
    answer = parse_answer(text, sequence.request.answer_format, is_final=is_final)
    events, sent = sequence.request.events, sequence.sent
    if len(answer.reasoning) > len(sent.reasoning):
        events.put({"reasoning": answer.reasoning[len(sent.reasoning) :]})
        sent.reasoning = answer.reasoning
    if len(answer.content) > len(sent.content):
        events.put({"text": answer.content[len(sent.content) :]})
        sent.content = answer.content
    for call in answer.calls[len(sent.calls) :]:
        events.put({"tool_call": call, "index": len(sent.calls)})
        sent.calls.append(call)
