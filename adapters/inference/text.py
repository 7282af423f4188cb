"""From a question to token ids, and from an answer's ids to the text that may be sent. No queue
here, and no model runs.
"""

from __future__ import annotations

from adapters.inference.batch import Answer
from adapters.inference.loaded_model import Held
from adapters.inference.types import Question
from training.engine.data.conversations import encode_prompt, render_messages, get_bos_ids

# Of an answer; a caller who says nothing gets this or what the model's context leaves
MOST_TOKENS = 4096


class Unanswerable(Exception):
    """The question itself is at fault; the message is for whoever asked."""


def ids_of(held: Held, question: Question) -> list[int]:
    """Raises Unanswerable: nothing to answer. DataError: the model's template does not take such a
    conversation.
    """
    if question.prompt is not None:
        words = held.tokenizer(question.prompt, add_special_tokens=False)["input_ids"]
        ids = [*get_bos_ids(held.tokenizer), *words]
    elif question.score:  # the conversation as it stands, its last answer, too
        ids = list(
            held.tokenizer(
                render_messages(held.tokenizer, {"messages": question.messages}), add_special_tokens=False
            )["input_ids"]
        )
    else:
        ids = encode_prompt(held.tokenizer, {"messages": question.messages})
    if not ids:
        raise Unanswerable("The prompt is empty.")
    return ids


def most_tokens(held: Held, question: Question, prompt_tokens: int) -> int:
    """Raises Unanswerable: the model's context does not hold prompt and answer."""
    room = held.longest - prompt_tokens
    wanted = min(MOST_TOKENS, max(1, room)) if question.max_tokens is None else question.max_tokens
    if wanted > room:
        raise Unanswerable(
            f"This model's context holds {held.longest:,} tokens; the prompt has {prompt_tokens:,} "
            f"and max_tokens asks for {wanted:,} more. Shorten one of them."
        )
    return wanted


def send_text(held: Held, answer: Answer, *, whole: bool) -> bool:
    """Send what is new and sure; True if a stop word ended the answer. What may become one is held
    back.
    """
    text = held.tokenizer.decode(answer.ids, skip_special_tokens=True)
    found = [place for place in (text.find(word) for word in answer.question.stop) if place >= 0]
    stopped = bool(found)
    if stopped:
        text = text[: min(found)]
    elif not whole:
        if text.endswith("\ufffd"):  # half a character: the next token completes it
            return False
        text = text[: len(text) - longest_beginning(text, answer.question.stop)]
    if len(text) > answer.sent:
        answer.question.said.put({"text": text[answer.sent :]})
        answer.sent = len(text)
    return stopped


def longest_beginning(text: str, words: tuple[str, ...]) -> int:
    """Characters at the end of `text` with which one of the words may begin."""
    sizes = (size for word in words for size in range(1, len(word)) if text.endswith(word[:size]))
    return max(sizes, default=0)
