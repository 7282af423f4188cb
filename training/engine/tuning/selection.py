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
from training.engine.tuning.search import FOLDER, Trial, compare

CHOSEN = "chosen.json"


def chosen_config(run_dir: Path, config: RunConfig) -> RunConfig:
    """The settings that trials chose, once they have; the winner's checkpoint is moved to the
    run's.
    """
    told = chosen(run_dir)
    if told is None:
        return config
    for folder in (state_folder(run_dir, told["winner"]) / checkpoint.FOLDER).glob("step-*"):
        (run_dir / checkpoint.FOLDER).mkdir(exist_ok=True)
        folder.rename(run_dir / checkpoint.FOLDER / folder.name)
    forget_states(run_dir)
    return replace(config, **told["settings"])


def chosen(run_dir: Path) -> dict[str, Any] | None:
    """What the `tuned` event says, and `told`: is it in the journal?"""
    path = run_dir / CHOSEN
    return json.loads(path.read_text()) if path.is_file() else None


def write_chosen(run_dir: Path, verdict: dict[str, Any], *, told: bool) -> None:
    write_atomically(run_dir / CHOSEN, json.dumps({**verdict, "told": told}))


def state_folder(run_dir: Path, number: int) -> Path:
    return run_dir / FOLDER / f"state-{number}"


def keep_state(session: Session, trial: Trial) -> None:
    """A trial can go on from where it stood. Those of others are forgotten only when this one's
    file is written.
    """
    aside = state_folder(session.run_dir, trial.number)
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    checkpoint.save(aside, trial.step, session.trained(), session.facts())


def forget_states(run_dir: Path, *, keep: tuple[int, ...] = ()) -> None:
    kept = {state_folder(run_dir, number) for number in keep}
    for folder in (run_dir / FOLDER).glob("state-*"):
        if folder not in kept:
            shutil.rmtree(folder, ignore_errors=True)


def better(best: Trial | None, trial: Trial) -> Trial | None:
    """The one with the lower loss, of those that went all the way."""
    if trial.state != "done":
        return best
    return trial if best is None or trial.losses[trial.step] < best.losses[best.step] else best


def verdict_of(plan: Trial, best: Trial, tokens: list[int]) -> tuple[dict[str, Any], Trial]:
    """What the rows that no trial saw say of the best trial against the plan's own guess, and which
    of the two goes on.
    """
    if plan.state != "done":
        message = f"The plan's own guess failed; trial {best.number + 1} goes on."
        return {"winner": best.number, "rows": 0, "message": message}, best
    difference, error = compare(plan, best, tokens)
    figures = {
        "winner": best.number,
        "plan_loss": sum(plan.unseen) / sum(tokens),
        "winner_loss": sum(best.unseen) / sum(tokens),
        "difference": difference,
        "standard_error": error,
        "rows": len(tokens),
    }
    rows, by = (
        f"{len(tokens)} rows that no trial saw",
        f"{abs(difference):.3f} (± {2 * error:.3f}) after {best.step} steps",
    )
    if best.number == plan.number:
        return figures | {"message": "No trial beat the plan's own guess, which goes on."}, plan
    if difference > 2 * error:
        return figures | {
            "message": f"Trial {best.number + 1} beats the plan's own guess by {by} on {rows}, and "
            "goes on."
        }, best
    if difference < -2 * error:
        message = (
            f"Trial {best.number + 1} looked best, but is worse than the plan's own guess by "
            f"{by} on {rows}."
        )
        message += " The guess goes on."
        return figures | {"winner": plan.number, "message": message}, plan
    message = (
        f"Trial {best.number + 1} goes on; on {rows} it differs from the plan's own guess by "
        f"no more than chance, {by}."
    )
    return figures | {"message": message}, best
