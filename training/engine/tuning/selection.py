"""The selection of the best trial: save its state, compare it with the baseline on held-out rows
that no trial used, and move it to where the run resumes.
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
    """Return the config with the settings of the selected trial, if there is one, and move its
    checkpoint to the run's checkpoints.
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
    """The fields of the `tuned` event, and `is_emitted`: whether the journal has the event."""
    path = run_dir / SELECTION_FILE
    return json.loads(path.read_text()) if path.is_file() else None


def save_selection(run_dir: Path, selection: dict[str, Any], *, is_emitted: bool) -> None:
    write_atomically(run_dir / SELECTION_FILE, json.dumps({**selection, "is_emitted": is_emitted}))


def state_folder(run_dir: Path, number: int) -> Path:
    return run_dir / TRIALS_FOLDER / f"state-{number}"


def save_trial_state(session: Session, trial: Trial) -> None:
    """Save a checkpoint of the trial, so that the run can continue from it. The states of other
    trials are deleted after the trial's own file is written.
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
    """The completed trial with the lower loss."""
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
    """Compare the best trial with the planned settings on the comparison rows. Returns fields of
    the `tuned` event and the trial that the run continues with.
    """
    if baseline.state != "done":
        message = (
            "The trial with the planned settings failed. The run continues with trial "
            f"{best_trial.number + 1}."
        )
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
    name = f"Trial {best_trial.number + 1}"
    details = (
        f"difference {abs(difference):.3f} (± {2 * standard_error:.3f}) after {best_trial.step} "
        f"steps, on {len(tokens)} rows that no trial used"
    )
    if best_trial.number == baseline.number:
        message = "No trial beat the planned settings. The run continues with them."
        return comparison | {"message": message}, baseline
    if difference > 2 * standard_error:
        message = f"{name} beats the planned settings and is used: {details}."
        return comparison | {"message": message}, best_trial
    if difference < -2 * standard_error:
        message = (
            f"{name} had the lowest loss, but is worse than the planned settings: {details}. "
            "The run continues with the planned settings."
        )
        return comparison | {"winner": baseline.number, "message": message}, baseline
    message = f"{name} is used, but does not differ significantly from the planned settings: "
    return comparison | {"message": f"{message}{details}."}, best_trial
