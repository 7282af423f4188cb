"""Questions in, words out: a round gives every answer under way its next token, all rows of a base
in one batch. No HTTP here.

A new question joins after a first forward of its own (continuous batching), a finished one leaves,
and nobody waits for the longest answer. Rows of different adapters share a batch where their tuner
can tell whose row is whose (`Held.mixes`).
"""

from __future__ import annotations

import os
import queue
import time
from collections import deque
from contextlib import suppress

import torch

from adapters.inference.batch import Answer, Batch, bytes_of
from adapters.inference.loaded_model import Held
from adapters.inference.model_cache import NoRoom, Residents
from adapters.inference.request_queue import Desk
from adapters.inference.sampling import logprobs_of, pick_token
from adapters.inference.text import Unanswerable, ids_of, most_tokens, send_text
from adapters.inference.types import Base, Question, Said, Weights
from training.errors import UserError

MAX_ROWS = 16  # under way at once

# without a question; then the memory is left to training, and the next question loads its base anew
IDLE_SECONDS = 900.0
HUNG_UP: Said = {"error": "The caller hung up."}


class Speaker:
    def __init__(self, desk: Desk) -> None:
        self.desk = desk
        self.residents = Residents()
        # In order; the first may wait for room, and all wait behind it
        self.waiting: deque[Question] = deque()
        self.batches: list[tuple[Held, Batch]] = []

    def speak_for_ever(self) -> None:
        while True:
            self._take_questions()
            self._rounds()

    def _rounds(self) -> None:
        """Of every batch. Not in the loop above, whose names would keep a base in memory while
        another is loaded for it.
        """
        for held, batch in list(self.batches):
            self._round(held, batch)
        self.batches = [(held, batch) for held, batch in self.batches if batch.answers]

    def _round(self, held: Held, batch: Batch) -> None:
        """A token for every row of a batch; who has ended, or hung up, leaves."""
        try:
            self._dismiss(
                batch,
                [(answer, HUNG_UP) for answer in batch.answers if answer.question.hung_up.is_set()],
            )
            if batch.answers:
                with torch.inference_mode():
                    logits = batch.step(held)
                last = [
                    (answer, self._heard(held, answer, row))
                    for answer, row in zip(batch.answers, logits, strict=True)
                ]
                self._dismiss(batch, [(answer, said) for answer, said in last if said is not None])
        except Exception as error:  # noqa: BLE001 told to whoever asked; other batches go on
            leave_if_lost(error)
            lost, batch.answers = batch.answers, []
            for answer in lost:
                self.desk.last_word(answer.question, told_of(error))

    def _heard(self, held: Held, answer: Answer, logits: torch.Tensor) -> Said | None:
        """One row's fault is that row's alone."""
        try:
            return self._hear(held, answer, logits)
        except Unanswerable as error:
            return told_of(error)

    def _dismiss(self, batch: Batch, last_words: list[tuple[Answer, Said]]) -> None:
        if last_words:
            batch.leave([answer for answer, _ in last_words])
        for answer, said in last_words:
            self.desk.last_word(answer.question, said)

    def _take_questions(self) -> None:
        """Take what waits, in order, while there is room; block only when there is nothing to
        say.
        """
        self._forget_callers()
        while sum(len(batch.answers) for _, batch in self.batches) < MAX_ROWS:
            if not self.waiting:
                try:
                    self.waiting.append(
                        self.desk.arrived.get(block=not self.batches, timeout=IDLE_SECONDS)
                    )
                except queue.Empty:
                    if not self.batches:
                        self.residents.let_go()
                    return
            question = self.waiting[0]
            try:
                if not self._take(question):
                    return  # everybody behind it waits, too, or it might wait for ever
            except Exception as error:  # noqa: BLE001 told to whoever asked
                leave_if_lost(error)
                self.desk.last_word(question, told_of(error))
            self.waiting.popleft()
            self.batches = [(held, batch) for held, batch in self.batches if batch.answers]

    def _forget_callers(self) -> None:
        """Whoever hung up gives their place back at once, wherever they stand in the line."""
        with suppress(queue.Empty):
            while True:
                self.waiting.append(self.desk.arrived.get_nowait())
        gone, there = deque[Question](), deque[Question]()
        for question in self.waiting:
            (gone if question.hung_up.is_set() else there).append(question)
        self.waiting = there
        for question in gone:
            self.desk.last_word(question, HUNG_UP)

    def _take(self, question: Question) -> bool:
        """Begin its answer; False if it has to wait until others have been answered."""
        if question.base not in self.residents.held:
            self._tell(question, "loading the base model")
        try:
            held = self.residents.get(question.base, self._busy())
        except NoRoom:
            return False
        if not held.fits(question.adapter):
            if held.base in self._busy():
                return False
        elif question.adapter is not None and question.adapter not in held.loaded:
            self._tell(question, "loading the adapter")
        held.bring(question.adapter, self._in_use(held))
        question.ids = question.ids or ids_of(held, question)
        most = most_tokens(held, question, len(question.ids))
        if (
            self.batches
            and self._cache_bytes() + held.entry_bytes * (len(question.ids) + most)
            > self.residents.cache_bytes
        ):
            return False
        with torch.inference_mode():
            self._begin(held, question, most)
        return True

    def _cache_bytes(self) -> int:
        """What the caches under way can grow to: in a batch every row is as long as the longest."""
        return sum(
            held.entry_bytes
            * len(batch.answers)
            * max(answer.prompt_tokens + answer.most_tokens for answer in batch.answers)
            for held, batch in self.batches
            if batch.answers
        )

    def _tell(self, question: Question, status: str) -> None:
        """Once each: a question that waits for room is looked at every round."""
        if status not in question.told:
            question.told.add(status)
            question.said.put({"status": status})

    def _busy(self) -> set[Base]:
        return {held.base for held, batch in self.batches if batch.answers}

    def _in_use(self, held: Held) -> set[Weights]:
        answers = [
            answer for other, batch in self.batches if other is held for answer in batch.answers
        ]
        return {
            answer.question.adapter for answer in answers if answer.question.adapter is not None
        }

    def _begin(self, held: Held, question: Question, most: int) -> None:
        """The first forward of a question, and its place in a batch."""
        ids = question.ids
        draw = torch.Generator(held.device)
        draw.seed() if question.seed is None else draw.manual_seed(question.seed)
        answer = Answer(question, len(ids), most, draw)
        output = held.first(
            torch.tensor([ids], device=held.device), question.adapter, every=question.score
        )
        if question.score:
            question.said.put(
                {"logprobs": logprobs_of(output.logits[0, -len(ids) :], ids), "ids": ids}
            )
        held.entry_bytes = bytes_of(output.cache) // max(1, output.cache.get_seq_length())
        said = self._hear(held, answer, output.logits[0, -1])
        if said is not None:
            self.desk.last_word(question, said)
            return
        self._batch_for(held, question.adapter, output.cache).join(answer, output.cache)

    def _batch_for(self, held: Held, adapter: Weights | None, cache: object) -> Batch:
        for other, batch in self.batches:
            alike = held.mixes or all(
                answer.question.adapter == adapter for answer in batch.answers
            )
            if other is held and alike and batch.takes(cache):
                return batch
        made = Batch()
        self.batches.append((held, made))
        return made

    def _hear(self, held: Held, answer: Answer, logits: torch.Tensor) -> Said | None:
        """Pick the next token, send what became readable; the last word when the answer is at its
        end.
        """
        question = answer.question
        if not bool(torch.isfinite(logits).all()):
            raise Unanswerable(
                "The model's numbers are not finite here: this version has diverged."
            )
        token = pick_token(
            logits, temperature=question.temperature, top_p=question.top_p, draw=answer.draw
        )
        answer.token = token
        ended = token in held.stop_ids
        if not ended:
            answer.ids.append(token)
        at_its_end = ended or len(answer.ids) >= answer.most_tokens
        stopped = send_text(held, answer, whole=at_its_end)
        if not at_its_end and not stopped:
            return None
        return {
            "done": "stop" if ended or stopped else "length",
            "prompt_tokens": answer.prompt_tokens,
            "completion_tokens": len(answer.ids),
            "tokens_per_second": len(answer.ids) / (time.monotonic() - answer.began),
        }


def told_of(error: Exception) -> Said:
    """The last word for who asked; `fault` says whose it is."""
    if isinstance(error, Unanswerable | UserError):
        return {"error": str(error), "fault": "theirs"}
    return {"error": f"{type(error).__name__}: {error}"}


def leave_if_lost(error: Exception) -> None:
    """After an error inside a kernel a process gets nothing more from its GPU: it ends, and `up`
    starts another.
    """
    if "CUDA error" in str(error):
        os._exit(70)
