"""Hyperparameter tuning before a run: short trials on one loaded base model choose learning rate,
rank, alpha and target modules by held-out loss.

Half of the held-out rows select the best trial. The other half is used by no trial; at the end it
shows whether the best trial is better than the planned settings. Each trial follows the learning
rate schedule of the complete run, so the run can continue from the best trial's checkpoint. Every
trial is a file in RUN_DIR/trials; a restarted engine continues with the next trial.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Generator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from training.engine.config import RunConfig
from training.engine.data.conversations import EncodedRow
from training.engine.data.errors import DataError
from training.engine.modeling import optimizers
from training.engine.modeling.model import LabeledPositionsHead
from training.engine.outcome import Outcome
from training.engine.stop_requests import StopRequests
from training.engine.train import checkpoint, evaluate
from training.engine.train.loop import Diverged, save_checkpoint, take_step
from training.engine.train.session import Event, Session, wrap_for_training
from training.engine.tuning.search import Search, Trial, compute_rungs, load_trials
from training.engine.tuning.selection import (
    apply_selection,
    compare_with_baseline,
    delete_trial_states,
    load_selection,
    save_selection,
    save_trial_state,
    select_better_trial,
)

MIN_EVAL_ROWS = 8  # With fewer held-out rows the two halves are too small to compare trials
TIMED_STEPS = 3

TuningEvents = Generator[Event, None, Outcome | None]


@dataclass
class TuningRun:
    """The state that all trials of a run share. `spent` and `budget` are in steps.

    `selection_rows` choose the best trial, `comparison_rows` compare it with the baseline. A budget
    in minutes is converted to steps: first by timing three steps, then, after each trial, by the
    measured time of all trials.
    """

    session: Session
    search: Search
    selection_rows: list[EncodedRow]
    comparison_rows: list[EncodedRow]
    budget: int
    spent: int = 0
    seconds: float = 0.0
    is_fresh: bool = True  # At step 0 with the planned settings

    def add_trial_time(self, trial: Trial) -> None:
        """Add a trial's time, which includes evaluating, saving and wrapping the model, and update
        a budget in minutes.
        """
        self.seconds += trial.seconds
        minutes = self.session.config.tuning_budget_minutes
        if minutes and self.seconds:
            self.budget = round(self.spent * 60 * minutes / self.seconds)

    def get_progress(self) -> dict[str, int]:
        return {"done": min(self.spent, self.budget), "total": self.budget}


def run_tuning(session: Session, stop_requests: StopRequests) -> TuningEvents:
    """Run trials until the budget is spent, then put the session into the state of the winner.
    Returns the outcome of a requested stop, or None.

    Raises:
        DataError: there are too few held-out rows.
        Diverged: no trial completed.
    """
    if len(session.eval_rows) < MIN_EVAL_ROWS:
        raise DataError(
            f"Tuning needs at least {MIN_EVAL_ROWS} held-out rows, and there are "
            f"{len(session.eval_rows)}. Hold out more rows, or set tuning_budget_fraction to 0.",
            field="tuning_budget_fraction",
        )
    saved_trials = list(load_trials(session.run_dir))
    yield from evaluate.evaluate_loss(session)
    yield from evaluate.generate_sample(session)
    yield "phase", {"name": "preparing trials"}
    tuning = start_tuning(session, saved_trials)
    best_trial: Trial | None = None
    for trial in saved_trials:
        yield "trial", build_trial_fields(tuning, trial)
        tuning.search.restore_trial(trial)
        tuning.spent += max(1, trial.step)
        tuning.add_trial_time(trial)
        best_trial = select_better_trial(best_trial, trial)
    while tuning.spent < tuning.budget or not tuning.search.trial_count:
        trial = tuning.search.ask()
        stop_outcome = yield from run_trial(tuning, trial, stop_requests)
        if stop_outcome is not None:
            return stop_outcome
        tuning.search.tell(trial)
        tuning.add_trial_time(trial)
        best_trial = select_better_trial(best_trial, trial)
        if best_trial is trial or (trial.number == 0 and trial.state == "done"):
            save_trial_state(session, trial)
        trial.write_json(session.run_dir)
        delete_trial_states(session.run_dir, keep=(0, best_trial.number if best_trial else 0))
    yield from apply_best_trial(tuning, best_trial)
    return None


def start_tuning(session: Session, saved_trials: list[Trial]) -> TuningRun:
    config, total_steps = session.config, session.plan.total_steps
    budget = round(config.tuning_budget_fraction * total_steps)
    if config.tuning_budget_minutes:
        budget = round(60 * config.tuning_budget_minutes / measure_step_seconds(session))
    rungs = (
        list(saved_trials[0].losses)
        if saved_trials and saved_trials[0].state == "done"
        else compute_rungs(budget, config, total_steps)
    )
    search = Search(
        config, list_module_sets(session.model, config), rungs, seed=config.seed + len(saved_trials)
    )
    return TuningRun(
        session,
        search,
        session.eval_rows[0::2],
        session.eval_rows[1::2],
        budget,
        is_fresh=not saved_trials,
    )


def measure_step_seconds(session: Session) -> float:
    """Mean seconds of the first steps, forward and backward only. The weights do not change."""
    began = time.monotonic()
    for batches in session.plan.steps[:TIMED_STEPS]:
        for batch in batches:
            tensors = evaluate.collate(
                batch, session.rows, session.tokenizer.pad_token_id, session.device
            )
            loss = session.head.compute_loss_sum(session.model, *tensors)
            loss.backward()  # type: ignore[no-untyped-call]
        session.optimizer.zero_grad(set_to_none=True)
    return (time.monotonic() - began) / min(TIMED_STEPS, len(session.plan.steps))


def list_module_sets(model: Any, config: RunConfig) -> list[str]:
    """The values of target_modules to choose from: the planned one, only attention layers, and only
    MLP layers. Just the planned one if attention and MLP layers share names.
    """
    module_names: dict[str, set[str]] = {"attn": set(), "mlp": set()}
    for name in (
        name.removesuffix(".lora_A")
        for name, _ in model.named_modules()
        if name.endswith(".lora_A")
    ):
        part = "attn" if "attn" in name or "attention" in name else "mlp"
        module_names[part].add(name.rsplit(".", 1)[-1])
    if not all(module_names.values()) or module_names["attn"] & module_names["mlp"]:
        return [config.target_modules]
    return [config.target_modules, *(",".join(sorted(names)) for names in module_names.values())]


def run_trial(tuning: TuningRun, trial: Trial, stop_requests: StopRequests) -> TuningEvents:
    """Train a trial from rung to rung until it is done, stopped early or failed. The first trial
    uses the session as it is. Returns the outcome of a requested stop, or None.
    """
    session, began = tuning.session, time.monotonic()
    yield "trial", build_trial_fields(tuning, trial)
    try:
        if not tuning.is_fresh:
            reset_adapter(session, {**trial.settings})
        tuning.is_fresh = False
        for rung in tuning.search.rungs:
            while session.step < rung:
                stop_outcome = stop_requests.get_requested_stop()
                if stop_outcome is not None:
                    return stop_outcome
                trial.steps.append(take_step(session)[1])
                tuning.spent += 1
                yield "phase", {"name": f"trial {trial.number + 1}", **tuning.get_progress()}
            loss = sum(compute_row_losses(session, tuning.selection_rows)) / sum(
                row.trained_tokens for row in tuning.selection_rows
            )
            if not math.isfinite(loss):
                raise Diverged(f"The held-out loss became {loss:g} at step {rung}.")
            trial.losses[rung] = loss
            if not tuning.search.should_continue(trial, loss):
                trial.state = "stopped"
                break
            if rung != tuning.search.rungs[-1]:
                yield "trial", build_trial_fields(tuning, trial)
        else:
            trial.state = "done"
            trial.comparison_losses = compute_row_losses(session, tuning.comparison_rows)
    except (Diverged, torch.OutOfMemoryError) as error:
        if trial.number == 0 and not trial.steps:
            raise  # The planned run itself cannot complete one step
        trial.state = "failed"
        tuning.spent += not trial.steps
        yield "log", {"level": "warning", "text": f"Trial {trial.number + 1} failed: {error}"}
    trial.seconds = time.monotonic() - began
    yield "trial", build_trial_fields(tuning, trial)
    return None


def build_trial_fields(tuning: TuningRun, trial: Trial) -> dict[str, Any]:
    """Fields of a `trial` event. Losses are pairs of step and nats per trained token."""
    return {
        "number": trial.number,
        "step": 0,  # The run itself has not started
        "settings": trial.settings,
        "steps": trial.step,
        "losses": [[step, loss] for step, loss in trial.losses.items()],
        "outcome": trial.state,
        "spent": tuning.spent,
        "budget": tuning.budget,
        "full_steps": tuning.search.rungs[-1],
        "seconds": trial.seconds,
    }


def reset_adapter(session: Session, settings: dict[str, Any]) -> None:
    """Replace the session's adapter by a new one with these settings, on the same base model, at
    step 0.
    """
    session.head.remove_hook()
    base = session.model.unload()
    session.optimizer.zero_grad(set_to_none=True)
    del session.optimizer
    gc.collect()
    session.config = replace(session.config, **settings)
    torch.manual_seed(session.config.seed)
    session.model = wrap_for_training(base, session.config, session.device)
    session.model.train()
    session.head = LabeledPositionsHead(session.model)
    session.optimizer = optimizers.make_optimizer(session.model, session.config, session.device)
    session.step = session.saved_step = session.total_tokens = 0
    session.loss = None


def compute_row_losses(session: Session, rows: list[EncodedRow]) -> list[float]:
    """Sum of the cross entropy of each row, in nats. Each batch holds one row, so two trials can
    be compared row by row.
    """
    pad_id, device = session.tokenizer.pad_token_id, session.device
    with evaluate.eval_mode(session.model):
        return [
            float(
                session.head.compute_loss_sum(
                    session.model, *evaluate.collate([(index,)], rows, pad_id, device)
                )
            )
            for index in range(len(rows))
        ]


def apply_best_trial(tuning: TuningRun, best_trial: Trial | None) -> Generator[Event, None, None]:
    """Select the winner, load its state into the session, and emit its steps and the `tuned`
    event.

    Raises:
        Diverged: no trial completed.
    """
    session = tuning.session
    baseline = next(iter(load_trials(session.run_dir)))
    if best_trial is None:
        raise Diverged(
            "No trial completed. Use a lower learning rate, or settings that need less memory."
        )
    comparison, winner = compare_with_baseline(
        baseline, best_trial, [row.trained_tokens for row in tuning.comparison_rows]
    )
    # Emit the steps first: if the engine is killed here, the next attempt resumes at step 0, which
    # discards them
    for step in winner.steps:
        yield "step", step
    reset_adapter(session, winner.settings)
    fields = {
        **comparison,
        "step": winner.step,
        "settings": winner.settings,
        "spent": tuning.spent,
        "trainable_parameters": session.count_trainable_parameters(),
    }
    save_selection(session.run_dir, fields, is_emitted=False)
    session.config = apply_selection(session.run_dir, session.config)
    latest = checkpoint.find_latest_valid(session.run_dir)
    if latest is not None:
        trainer_state = checkpoint.load_checkpoint(latest, session.get_checkpoint_state())
        session.step = trainer_state.pop("step")
        session.total_tokens, session.loss = (
            winner.steps[-1]["total_tokens"],
            winner.steps[-1]["loss"],
        )
    yield from emit_tuned_event(session.run_dir)
    yield from evaluate.evaluate_loss(session)
    yield from evaluate.generate_sample(session)
    # Again, now with the evaluation in its trainer state
    is_final = session.step == session.plan.total_steps
    yield from save_checkpoint(session, is_final=is_final)


def emit_tuned_event(run_dir: Path) -> Generator[Event, None, None]:
    """Emit the `tuned` event if the journal does not have it. The engine may have been killed after
    saving the selection and before emitting the event.
    """
    selection = load_selection(run_dir)
    if selection is not None and not selection.pop("is_emitted"):
        yield "tuned", selection
        save_selection(run_dir, selection, is_emitted=True)
