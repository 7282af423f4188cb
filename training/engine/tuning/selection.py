"""Which trial goes on: its state is kept aside, judged on rows that no trial saw, and moved to
where the run resumes.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from training.engine.config import RunConfig
from training.engine.files import write_atomically
from training.engine.train import checkpoint
from training.engine.train.session import Session
from training.engine.tuning.search import TRIALS_FOLDER, Trial, compare_trials

SELECTION_FILE = "selection.json"


def apply_selection(run_dir: Path, config: RunConfig) -> RunConfig:
    """The settings that trials chose, once they have; the winner's checkpoint is moved to the
    run's.
    """
    selection = load_selection(run_dir)
    if selection is None:
        return config
    for folder in (state_folder(run_dir, selection["winner"]) / checkpoint.FOLDER).glob("step-*"):
        (run_dir / checkpoint.FOLDER).mkdir(exist_ok=True)
        folder.rename(run_dir / checkpoint.FOLDER / folder.name)
    delete_trial_states(run_dir)
    return replace(config, **selection["settings"])


def load_selection(run_dir: Path) -> dict[str, Any] | None:
    """What the `tuned` event says, and `told`: is it in the journal?"""
    path = run_dir / SELECTION_FILE
    return json.loads(path.read_text()) if path.is_file() else None


def save_selection(run_dir: Path, selection: dict[str, Any], *, is_emitted: bool) -> None:
    write_atomically(run_dir / SELECTION_FILE, json.dumps({**selection, "is_emitted": is_emitted}))


def state_folder(run_dir: Path, number: int) -> Path:
    return run_dir / TRIALS_FOLDER / f"state-{number}"


def save_trial_state(session: Session, trial: Trial) -> None:
    """A trial can go on from where it stood. Those of others are forgotten only when this one's
    file is written.
    """
    state_dir = state_folder(session.run_dir, trial.number)
    shutil.rmtree(state_dir, ignore_errors=True)
    state_dir.mkdir(parents=True)
    checkpoint.save_checkpoint(
        state_dir, trial.step, session.get_checkpoint_state(), session.get_trainer_state()
    )


def delete_trial_states(run_dir: Path, *, keep: tuple[int, ...] = ()) -> None:
    keep_folders = {state_folder(run_dir, number) for number in keep}
    for folder in (run_dir / TRIALS_FOLDER).glob("state-*"):
        if folder not in keep_folders:
            shutil.rmtree(folder, ignore_errors=True)


def select_better_trial(best_trial: Trial | None, trial: Trial) -> Trial | None:
    """The one with the lower loss, of those that went all the way."""
    if trial.state != "done":
        return best_trial
    return (
        trial
        if best_trial is None or trial.losses[trial.step] < best_trial.losses[best_trial.step]
        else best_trial
    )


def compare_with_baseline(
    baseline: Trial, best_trial: Trial, tokens: list[int]
) -> tuple[dict[str, Any], Trial]:
    """What the rows that no trial saw say of the best trial against the plan's own guess, and which
    of the two goes on.
    """
    if baseline.state != "done":
        message = f"The plan's own guess failed; trial {best_trial.number + 1} goes on."
        return {"winner": best_trial.number, "rows": 0, "message": message}, best_trial
    difference, standard_error = compare_trials(baseline, best_trial, tokens)
    comparison = {
        "winner": best_trial.number,
        "plan_loss": sum(baseline.comparison_losses) / sum(tokens),
        "winner_loss": sum(best_trial.comparison_losses) / sum(tokens),
        "difference": difference,
        "standard_error": standard_error,
        "rows": len(tokens),
    }
    rows_description, difference_description = (
        f"{len(tokens)} rows that no trial saw",
        f"{abs(difference):.3f} (± {2 * standard_error:.3f}) after {best_trial.step} steps",
    )
    if best_trial.number == baseline.number:
        return comparison | {
            "message": "No trial beat the plan's own guess, which goes on."
        }, baseline
    if difference > 2 * standard_error:
        return comparison | {
            "message": f"Trial {best_trial.number + 1} beats the plan's own guess by {difference_description} on {rows_description}, and "
            "goes on."
        }, best_trial
    if difference < -2 * standard_error:
        message = (
            f"Trial {best_trial.number + 1} looked best, but is worse than the plan's own guess by "
            f"{difference_description} on {rows_description}."
        )
        message += " The guess goes on."
        return comparison | {"winner": baseline.number, "message": message}, baseline
    message = (
        f"Trial {best_trial.number + 1} goes on; on {rows_description} it differs from the plan's own guess by "
        f"no more than chance, {difference_description}."
    )
    return comparison | {"message": message}, best_trial
