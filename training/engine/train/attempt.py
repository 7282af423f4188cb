"""One start of the engine in a run folder: prepares, trains, exports, and knows what to say of how
it ended.
"""

from __future__ import annotations

import errno
from collections.abc import Generator
from pathlib import Path
from typing import TypeVar

import torch

from training.engine.config import RunConfig
from training.engine.events import Journal
from training.engine.methods import METHODS
from training.engine.outcome import Outcome, Result
from training.engine.stop_signals import StopSignals
from training.engine.train import checkpoint
from training.engine.train.exact_match import exact_match
from training.engine.train.loop import DiskFull, Diverged, train
from training.engine.train.session import Event, Session, prepare
from training.engine.tuning.selection import chosen, chosen_config
from training.engine.tuning.tune import tell_chosen, tune

Ended = TypeVar("Ended")


class Attempt:
    def __init__(self, run_dir: Path, journal: Journal, *, number: int) -> None:
        self.run_dir = run_dir
        self.journal = journal
        self.number = number
        self.session: Session | None = None
        self.adapter_step: int | None = None
        self.exact_match: float | None = None
        self.phase = "starting"

    def run(self, config: RunConfig, reins: StopSignals) -> tuple[Outcome, str]:
        """Train to an end; the adapter is exported if it is to be kept."""
        config = chosen_config(self.run_dir, config)
        for made in prepare(config, self.run_dir, self.number):
            if isinstance(made, Session):
                self.session = made
            else:
                self.write(*made)
        assert self.session is not None
        outcome = None
        if config.has_tuning and chosen(self.run_dir) is None:
            outcome = self.follow(tune(self.session, reins))
        self.follow(tell_chosen(self.run_dir))
        outcome = outcome or self.follow(train(self.session, reins))
        if outcome in (Outcome.FINISHED, Outcome.STOPPED):
            self.export(config)
        if outcome is Outcome.FINISHED:
            self.compare_answers(reins)
        return outcome, ""

    def follow(self, part: Generator[Event, None, Ended]) -> Ended:
        """Write a part's events to the journal; returns how it ended."""
        while True:
            try:
                self.write(*next(part))
            except StopIteration as stop:
                ended: Ended = stop.value
                return ended

    def export(self, config: RunConfig) -> None:
        """The best checkpoint's adapter if that is wished and it is still there, else the newest
        one's.
        """
        assert self.session is not None
        best = self.session.best_step if config.export_checkpoint == "best" else None
        kept = {
            checkpoint.step_of(folder): folder
            for folder in checkpoint.all_checkpoints(self.run_dir)
        }
        if not kept:
            return  # stopped before the first step
        self.write("phase", {"name": "exporting adapter"})
        self.adapter_step = best if best in kept else max(kept)
        folder = checkpoint.export_adapter(kept[self.adapter_step], self.run_dir)
        if METHODS[config.method].is_full_finetuning:  # a base model of its own needs its tokenizer
            self.session.tokenizer.save_pretrained(folder)

    def compare_answers(self, reins: StopSignals) -> None:
        """Exact match of the exported weights, which may be those of an earlier step. It costs
        nobody a finished run.
        """
        session = self.session
        assert session is not None
        if not session.config.exact_match_rows or self.adapter_step is None:
            return
        if self.adapter_step != session.step:
            checkpoint.load(
                self.run_dir / checkpoint.FOLDER / checkpoint.name_of(self.adapter_step),
                session.trained(),
            )
        try:
            for kind, payload in exact_match(session, reins):
                if kind == "answers":
                    payload["step"] = self.adapter_step
                    self.exact_match = payload["exact_match"]
                self.write(kind, payload)
        except (
            RuntimeError,
            IndexError,
        ) as error:  # out of memory, or a prompt longer than the model's positions
            self.write(
                "log",
                {"level": "warning", "text": f"Held-out answers could not be compared: {error}"},
            )

    def write(self, kind: str, payload: dict[str, object]) -> None:
        if kind == "phase":
            self.phase = str(payload["name"])
        self.journal.write_event(kind, **payload)

    def explain(self, error: Exception) -> tuple[Outcome, str]:
        """An outcome and a sentence for an error that came up in training."""
        step = self.session.step if self.session else 0
        if isinstance(error, Diverged):
            return Outcome.DIVERGED, str(error)
        if isinstance(error, DiskFull) or (
            isinstance(error, OSError) and error.errno == errno.ENOSPC
        ):
            return Outcome.DISK, f"{error} Free some space, then go on from the checkpoint."
        if isinstance(error, torch.OutOfMemoryError):
            return Outcome.MEMORY, f"Out of memory at step {step}, while {self.phase}."
        return Outcome.CRASHED, f"{type(error).__name__} while {self.phase} at step {step}: {error}"

    def result(self, outcome: Outcome, message: str) -> Result:
        session = self.session
        if session is None:
            return Result(outcome=outcome, message=message)
        measured = {
            session.heldout_step: session.eval_loss,
            session.best_step: session.best_loss,
        }
        return Result(
            outcome=outcome,
            message=message,
            step=session.step,
            total_steps=session.plan.total_steps,
            loss=session.loss,
            eval_loss=measured.get(self.adapter_step),
            exact_match=self.exact_match,
            adapter_step=self.adapter_step,
            trainable_parameters=session.trainable_parameters(),
            total_tokens=session.total_tokens,
        )
