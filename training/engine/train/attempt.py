"""One attempt of a run: load, tune, train, export, and report the outcome."""

from __future__ import annotations

import traceback
from collections.abc import Generator
from pathlib import Path
from typing import TypeVar

from training.engine.config import RunConfig
from training.engine.events import Journal
from training.engine.files import describe_storage_error
from training.engine.methods import METHODS
from training.engine.modeling.host_errors import (
    DEVICE_ASSERT,
    is_out_of_memory,
    is_transient,
)
from training.engine.outcome import Outcome, Result
from training.engine.stop_requests import StopRequests
from training.engine.train import checkpoint
from training.engine.train.exact_match import measure_exact_match
from training.engine.train.loop import Diverged, run_training_loop
from training.engine.train.session import Event, Session, prepare_session
from training.engine.tuning.selection import apply_selection, load_selection
from training.engine.tuning.tune import emit_tuned_event, run_tuning
from training.errors import convert_panics, find_storage_error

ReturnT = TypeVar("ReturnT")
OUT_OF_INDICES = "index out of range in self"  # the same check of torch on a CPU


def format_cause(error: Exception, moment: str) -> str:
    """The error in one sentence, without the further lines of long messages."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
    cause = f"{type(error).__name__} {moment}: {text[:300].rstrip('.')}."
    if DEVICE_ASSERT in str(error) or OUT_OF_INDICES in str(error):
        cause += (
            " A row has a token that the model's embedding does not have, or more tokens than it "
            "has positions."
        )
    return cause


class Attempt:
    """One start of the engine in a run folder.

    `training.engine.__main__` creates it in the main thread of the engine process. It collects the
    events of every stage and writes them to the journal. It ends when `train_and_export` returns an
    outcome or raises; `classify_error` turns the error into an outcome.
    """

    def __init__(self, run_dir: Path, journal: Journal, *, number: int) -> None:
        self.run_dir = run_dir
        self.journal = journal
        self.number = number
        self.session: Session | None = None
        self.adapter_step: int | None = None
        self.exact_match: float | None = None
        self.phase = "starting"

    def train_and_export(
        self, config: RunConfig, stop_requests: StopRequests
    ) -> tuple[Outcome, str]:
        """Run the whole attempt. The weights are exported if it finished or a user
        stopped it without discarding it."""
        config = apply_selection(self.run_dir, config)
        for item in prepare_session(config, self.run_dir, self.number):
            if isinstance(item, Session):
                self.session = item
            else:
                self.write_event(*item)
        assert self.session is not None
        outcome = None
        if config.has_tuning and load_selection(self.run_dir) is None:
            outcome = self.record_events(run_tuning(self.session, stop_requests))
        self.record_events(emit_tuned_event(self.run_dir))
        outcome = outcome or self.record_events(run_training_loop(self.session, stop_requests))
        if outcome in (Outcome.FINISHED, Outcome.STOPPED):
            self.export_weights(config)
        if outcome is Outcome.FINISHED:
            self.evaluate_exact_match(stop_requests)
        return outcome, ""

    def record_events(self, events: Generator[Event, None, ReturnT]) -> ReturnT:
        """Write the events of one stage to the journal; return the generator's return value."""
        while True:
            try:
                self.write_event(*next(events))
            except StopIteration as stop:
                return_value: ReturnT = stop.value
                return return_value

    def export_weights(self, config: RunConfig) -> None:
        """Export the best checkpoint if the settings ask for it and it still exists, otherwise the
        newest one.
        """
        assert self.session is not None
        best_step = self.session.best_step if config.export_checkpoint == "best" else None
        checkpoints = {
            checkpoint.parse_step(folder): folder
            for folder in checkpoint.list_checkpoints(self.run_dir)
        }
        if not checkpoints:
            return  # The run stopped before its first step
        self.write_event("phase", {"name": "exporting adapter"})
        self.adapter_step = best_step if best_step in checkpoints else max(checkpoints)
        folder = checkpoint.export_adapter(checkpoints[self.adapter_step], self.run_dir)
        if METHODS[config.method].is_full_finetuning:
            # The result is a complete model, so it needs its tokenizer
            self.session.tokenizer.save_pretrained(folder)

    def evaluate_exact_match(self, stop_requests: StopRequests) -> None:
        """Measure exact match with the exported weights, which may be from an earlier step. A
        failure other than of the disk is logged and does not fail the run.
        """
        session = self.session
        assert session is not None
        if not session.config.exact_match_rows or self.adapter_step is None:
            return
        folder = self.run_dir / checkpoint.FOLDER / checkpoint.get_folder_name(self.adapter_step)
        try:
            if self.adapter_step != session.step:
                checkpoint.load_checkpoint(folder, session.get_checkpoint_state())
            with convert_panics():
                for kind, fields in measure_exact_match(session, stop_requests):
                    if kind == "exact_match":
                        fields["step"] = self.adapter_step
                        self.exact_match = fields["exact_match"]
                    self.write_event(kind, fields)
        # Whatever fails here, the adapter has been exported
        except Exception as error:
            if find_storage_error(error):
                raise
            traceback.print_exc()  # to engine.log
            cause = f"{type(error).__name__}: {error}"
            self.write_event(
                "log",
                {"level": "warning", "text": f"Exact match could not be measured: {cause}"},
            )

    def write_event(self, kind: str, fields: dict[str, object]) -> None:
        if kind == "phase":
            self.phase = str(fields["name"])
        self.journal.write_event(kind, **fields)

    def classify_error(self, error: Exception) -> tuple[Outcome, str]:
        """Map an error of the attempt to an outcome and a message."""
        step = self.session.step if self.session else 0
        if isinstance(error, Diverged):
            return Outcome.DIVERGED, str(error)
        storage_message = describe_storage_error(error, self.run_dir)
        if storage_message is not None:
            return Outcome.DISK_FULL, f"Stopped at step {step}. {storage_message}"
        if is_out_of_memory(error):
            return Outcome.OUT_OF_MEMORY, f"Out of memory at step {step} while {self.phase}."
        message = format_cause(error, f"while {self.phase} at step {step}")
        if is_transient(error):
            return Outcome.CRASHED, message
        return Outcome.FAULT, f"{message} A retry would fail in the same way."

    def build_result(self, outcome: Outcome, message: str) -> Result:
        session = self.session
        if session is None:
            return Result(outcome=outcome, message=message)
        losses_by_step = {
            session.last_eval_step: session.eval_loss,
            session.best_step: session.best_loss,
        }
        return Result(
            outcome=outcome,
            message=message,
            step=session.step,
            total_steps=session.plan.total_steps,
            loss=session.loss,
            eval_loss=losses_by_step.get(self.adapter_step),
            exact_match=self.exact_match,
            adapter_step=self.adapter_step,
            trainable_parameters=session.count_trainable_parameters(),
            total_tokens=session.total_tokens,
        )
