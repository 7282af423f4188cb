"""One base model with its adapters, answering several questions a token at a time, in turn. It knows no HTTP.

Every question has a KV cache of its own. Each round gives each of them one token under its own adapter (or none), so base and
adapter answer side by side from one set of weights, and a long answer never blocks a short one.
"""

from __future__ import annotations

import queue
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import torch

from adapters.inference.held import Base, Held, Weights
from adapters.inference.sampling import pick_token
from training.engine.conversations import prompt_ids

MAX_QUESTIONS = 8  # under way and waiting; the next one is told to come back

Said = dict[str, Any]
HUNG_UP: Said = {"error": "The caller hung up."}


class Busy(Exception):
    """MAX_QUESTIONS are under way."""


@dataclass
class Question:
    """What to answer, with which adapter (None: the base alone), and where the answer goes."""

    base: Base
    adapter: Weights | None
    messages: list[dict[str, str]]
    max_tokens: int = 200
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    said: queue.Queue[Said] = field(default_factory=queue.Queue)
    hung_up: threading.Event = field(default_factory=threading.Event)


@dataclass
class Answer:
    """A question under way. `pending` are the ids that the model has not seen yet, shape (1, n)."""

    question: Question
    pending: torch.Tensor
    prompt_tokens: int
    draw: torch.Generator
    cache: Any = None
    ids: list[int] = field(default_factory=list)
    sent: str = ""
    began: float = field(default_factory=time.monotonic)


class Speaker:
    def __init__(self) -> None:
        self.held = Held()
        self.waiting: queue.Queue[Question] = queue.Queue()
        self.next_base: Question | None = None  # waits until what is held has answered
        self.answers: list[Answer] = []
        self._count = 0
        self._lock = threading.Lock()

    def start(self) -> None:
        threading.Thread(target=self._speak_for_ever, name="speaker", daemon=True).start()

    def ask(self, question: Question) -> None:
        """Take a question. `question.said` gets `{"text"}` pieces, perhaps `{"status"}` before, then `{"done"}` or `{"error"}`.

        A caller who goes away sets `question.hung_up`; the place is free when the last word is said, whatever it is.

        Raises:
            Busy: MAX_QUESTIONS are under way.
        """
        with self._lock:
            if self._count >= MAX_QUESTIONS:
                raise Busy(f"{self._count} questions are being answered; try again in a few seconds.")
            self._count += 1
        self.waiting.put(question)

    def _last_word(self, question: Question, said: Said) -> None:
        with self._lock:
            self._count -= 1
        question.said.put(said)

    def _speak_for_ever(self) -> None:
        while True:
            self._take_questions()
            for answer in list(self.answers):
                try:
                    last = HUNG_UP if answer.question.hung_up.is_set() else self._say_one_token(answer)
                except Exception as error:  # noqa: BLE001 told to whoever asked; the other answers go on
                    last = {"error": f"{type(error).__name__}: {error}"}
                if last is not None:
                    self.answers.remove(answer)
                    self._last_word(answer.question, last)

    def _take_questions(self) -> None:
        """Take what waits, in order; block only when there is nothing to say.

        A question for another base, or with an adapter of another type, waits until those of the present have been answered, and
        everybody behind it waits with it.
        """
        while True:
            if self.next_base is not None and self.answers:
                return
            try:
                question = self.next_base or self.waiting.get(block=not self.answers)
            except queue.Empty:
                return
            self.next_base = None
            if question.hung_up.is_set():
                self._last_word(question, HUNG_UP)
            elif self.answers and not self.held.fits(question.base, question.adapter):
                self.next_base = question
            else:
                self._take(question)

    def _take(self, question: Question) -> None:
        try:
            self.answers.append(self._begin(question))
        except Exception as error:  # noqa: BLE001 told to whoever asked
            self._last_word(question, {"error": f"{type(error).__name__}: {error}"})

    def _begin(self, question: Question) -> Answer:
        if self.held.base != question.base:
            question.said.put({"status": "loading the base model"})
            self.held.load_base(question.base)
        if question.adapter is not None and question.adapter not in self.held.loaded:
            question.said.put({"status": "loading the adapter"})
        self._use(question.adapter)
        ids = prompt_ids(self.held.tokenizer, {"messages": question.messages})
        return Answer(
            question=question,
            pending=torch.tensor([ids], device=self.held.device),
            prompt_tokens=len(ids),
            draw=torch.Generator(self.held.device).manual_seed(question.seed),
        )

    def _use(self, adapter: Weights | None) -> None:
        self.held.use(adapter, {answer.question.adapter for answer in self.answers})

    @torch.inference_mode()
    def _say_one_token(self, answer: Answer) -> Said | None:
        """Add one token to an answer and send what became readable; the last word when it is at its end."""
        question = answer.question
        self._use(question.adapter)
        output = self.held.forward(answer.pending, answer.cache, question.adapter)
        answer.cache = output.cache
        token = pick_token(output.logits[0, -1], temperature=question.temperature, top_p=question.top_p, draw=answer.draw)
        answer.pending = torch.tensor([[token]], device=self.held.device)
        ended = token in self.held.stop_ids
        if not ended:
            answer.ids.append(token)
        at_its_end = ended or len(answer.ids) >= question.max_tokens
        self._send_text(answer, whole=at_its_end)
        if at_its_end:
            return {
                "done": "stop" if ended else "length",
                "prompt_tokens": answer.prompt_tokens,
                "completion_tokens": len(answer.ids),
                "tokens_per_second": len(answer.ids) / (time.monotonic() - answer.began),
            }
        return None

    def _send_text(self, answer: Answer, *, whole: bool) -> None:
        text = self.held.tokenizer.decode(answer.ids, skip_special_tokens=True)
        if whole or not text.endswith("\ufffd"):  # half a character: the next token completes it
            answer.question.said.put({"text": text[len(answer.sent) :]})
            answer.sent = text
