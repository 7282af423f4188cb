"""Short trials before a run, on one loaded base: they choose rates, ranks and layers by held-out
loss, and the best one goes on.

Every second held-out row chooses; the others are seen by no trial and tell at the end whether the
winner is better than the plan's own guess. A trial follows the whole run's learning rates, so that
it can go on where it stands. Each one is a file in RUN_DIR/trials; an engine that was killed goes
on with the next.
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
from training.engine.data.conversations import DataError, EncodedRow
from training.engine.modeling import optimizers
from training.engine.modeling.model import LabeledPositionsHead
from training.engine.outcome import Outcome
from training.engine.stop_signals import StopSignals
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

MIN_EVAL_ROWS = 8  # held out: below, the halves say nothing
TIMED_STEPS = 3

TuningEvents = Generator[Event, None, Outcome | None]


@dataclass
class TuningRun:
    """What all trials share. `seeing` rows choose, `unseen` ones compare; `spent` and `budget` are
    steps.

    Minutes are made steps by the first three, and after each trial by what the trials really took.
    """

    session: Session
    search: Search
    selection_rows: list[EncodedRow]
    comparison_rows: list[EncodedRow]
    budget: int
    spent: int = 0
    seconds: float = 0.0
    is_fresh: bool = True  # the session stands at step 0 with the plan's own settings

    def add_trial_time(self, trial: Trial) -> None:
        """A trial's seconds, with all that a step alone does not show: measuring, saving, wrapping
        anew.
        """
        self.seconds += trial.seconds
        minutes = self.session.config.tuning_budget_minutes
        if minutes and self.seconds:
            self.budget = round(self.spent * 60 * minutes / self.seconds)

    def get_progress(self) -> dict[str, int]:
        return {"done": min(self.spent, self.budget), "total": self.budget}


def run_tuning(session: Session, stop_signals: StopSignals) -> TuningEvents:
    """Run trials until the budget is spent; leaves the session as the winner at its last step.
    Returns an order to end, or None.

    Raises:
        DataError: too few held-out rows to choose by.
    """
    if len(session.eval_rows) < MIN_EVAL_ROWS:
        raise DataError(
            f"Trials compare held-out losses, and {len(session.eval_rows)} held-out rows are too "
            f"few; hold out {MIN_EVAL_ROWS} or more, or switch the trials off.",
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
        stop_outcome = yield from run_trial(tuning, trial, stop_signals)
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
    """Of the first steps, forward and backward alone: nothing is learned by it."""
    began = time.monotonic()
    for batches in session.plan.steps[:TIMED_STEPS]:
        for batch in batches:
            tensors = evaluate.collate(
                batch, session.rows, session.tokenizer.pad_token_id, session.device
            )
            session.head.compute_loss_sum(session.model, *tensors).backward()  # type: ignore[no-untyped-call]
        session.optimizer.zero_grad(set_to_none=True)
    return (time.monotonic() - began) / min(TIMED_STEPS, len(session.plan.steps))


def list_module_sets(model: Any, config: RunConfig) -> list[str]:
    """The plan's layers; and those of attention alone and of the feed-forward part alone, where
    their names differ.
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


def run_trial(tuning: TuningRun, trial: Trial, stop_signals: StopSignals) -> TuningEvents:
    """Train a trial from rung to rung, until it is done, stopped early or failed. The first one is
    the session as it stands.
    """
    session, began = tuning.session, time.monotonic()
    yield "trial", build_trial_fields(tuning, trial)
    try:
        if not tuning.is_fresh:
            reset_adapter(session, {**trial.settings})
        tuning.is_fresh = False
        for rung in tuning.search.rungs:
            while session.step < rung:
                stop_outcome = stop_signals.requested_stop()
                if stop_outcome is not None:
                    return stop_outcome
                trial.steps.append(take_step(session)[1])
                tuning.spent += 1
                yield "phase", {"name": f"trial {trial.number + 1}", **tuning.get_progress()}
            loss = sum(compute_row_losses(session, tuning.selection_rows)) / sum(
                row.trained_tokens for row in tuning.selection_rows
            )
            if not math.isfinite(loss):
                raise Diverged(f"Its held-out loss became {loss:g} at step {rung}.")
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
            raise  # it is the run as it was planned, and cannot take one step
        trial.state = "failed"
        tuning.spent += not trial.steps
        yield "log", {"level": "warning", "text": f"Trial {trial.number + 1} failed: {error}"}
    trial.seconds = time.monotonic() - began
    yield "trial", build_trial_fields(tuning, trial)
    return None


def build_trial_fields(tuning: TuningRun, trial: Trial) -> dict[str, Any]:
    """What a `trial` event tells. Losses by step, nats per trained token."""
    return {
        "number": trial.number,
        "step": 0,  # of the run, which has not begun
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
    """The same base with a new adapter at step 0."""
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
    """Sum of the cross entropy of each row, in nats: batches hold one row, so that rows can be
    compared in pairs.
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
    """Say who won and by how much, put the winner's state into the session, and let the run go on
    from there.
    """
    session = tuning.session
    baseline = next(iter(load_trials(session.run_dir)))
    if best_trial is None:
        raise Diverged(
            "Not one trial got to its end; a lower learning rate or less memory is the usual cure."
        )
    comparison, winner = compare_with_baseline(
        baseline, best_trial, [row.trained_tokens for row in tuning.comparison_rows]
    )
    # First: an attempt that breaks off here rewinds to step 0, and these with it
    for step in winner.steps:
        yield "step", step
    reset_adapter(session, winner.settings)
    fields = {
        **comparison,
        "step": winner.step,
        "settings": winner.settings,
        "spent": tuning.spent,
        **describe_model_size(session),
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
    yield from save_checkpoint(session)  # anew, with what was measured


def emit_tuned_event(run_dir: Path) -> Generator[Event, None, None]:
    """The `tuned` event, unless it is in the journal: an engine may be killed after it chose and
    before it told.
    """
    selection = load_selection(run_dir)
    if selection is not None and not selection.pop("is_emitted"):
        yield "tuned", selection
        save_selection(run_dir, selection, is_emitted=True)


def describe_model_size(session: Session) -> dict[str, int]:
    return {"trainable_parameters": session.count_trainable_parameters()}
