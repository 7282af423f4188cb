"""The search over trials: which settings to try next and which trial to stop early. No torch here.

It uses Optuna's TPE sampler and asynchronous successive halving (Li et al. 2020, A System for
Massively Parallel Hyperparameter Tuning; Bergstra et al. 2011, Algorithms for Hyper-Parameter
Optimization). The first trial has the planned settings. It is never stopped early because the
others are compared with it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState

from training.engine.config import RunConfig
from training.engine.files import write_atomically
from training.engine.settings import list_candidate_ranks

TRIALS_FOLDER = "trials"
REDUCTION_FACTOR = 2  # The better half of the trials continues
LEARNING_RATE_FACTOR = 4.0  # The search covers planned rate / 4 to planned rate * 4
TRIAL_STATES = {
    "done": TrialState.COMPLETE,
    "stopped": TrialState.PRUNED,
    "failed": TrialState.FAIL,
}


@dataclass
class Trial:
    """One trial and its results.

    `losses` maps a step to the held-out loss on the selection rows. `comparison_losses` are the
    loss sums of the comparison rows, which do not influence the choice.
    """

    number: int
    settings: dict[str, Any]
    params: dict[str, Any]
    losses: dict[int, float] = field(default_factory=dict)
    state: str = "running"
    seconds: float = 0.0
    comparison_losses: list[float] = field(default_factory=list)
    steps: list[dict[str, Any]] = field(default_factory=list)

    @property
    def step(self) -> int:
        return len(self.steps)

    def write_json(self, run_dir: Path) -> None:
        folder = run_dir / TRIALS_FOLDER
        folder.mkdir(exist_ok=True)
        write_atomically(folder / f"{self.number}.json", json.dumps(asdict(self)))


def load_trials(run_dir: Path) -> Iterator[Trial]:
    """The trials saved in the run's folder, in order."""
    for path in sorted((run_dir / TRIALS_FOLDER).glob("*.json"), key=lambda path: int(path.stem)):
        values = json.loads(path.read_text())
        yield Trial(
            **{**values, "losses": {int(step): loss for step, loss in values["losses"].items()}}
        )


class Search:
    """An Optuna study over the trials of one run.

    `module_sets` are the values of target_modules to choose from, the planned one first. Trials
    are compared after each of `rungs` steps.
    """

    def __init__(
        self, config: RunConfig, module_sets: list[str], rungs: list[int], *, seed: int
    ) -> None:
        self.config = config
        self.rungs = rungs
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        pruner = optuna.pruners.SuccessiveHalvingPruner(
            min_resource=rungs[0], reduction_factor=REDUCTION_FACTOR
        )
        sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=4)
        self.study = optuna.create_study(sampler=sampler, pruner=pruner)
        self.space = build_search_space(config, module_sets)
        self.open_trial: optuna.Trial | None = None
        self.trial_count = 0

    def ask(self) -> Trial:
        """Start the next trial: first the planned settings, then what the sampler suggests."""
        if self.trial_count == 0:
            self.study.enqueue_trial(get_initial_params(self.config, self.space))
        self.open_trial = self.study.ask(self.space)
        trial = Trial(
            self.trial_count,
            params_to_settings(self.config, self.open_trial.params),
            self.open_trial.params,
        )
        self.trial_count += 1
        return trial

    def should_continue(self, trial: Trial, loss: float) -> bool:
        """Report a trial's loss at its step. Returns whether it is in the better half so far."""
        assert self.open_trial is not None
        self.open_trial.report(loss, trial.step)
        # Also called for the first trial: Optuna records its rung, which later trials need
        is_pruned = self.open_trial.should_prune()
        return trial.number == 0 or not is_pruned

    def tell(self, trial: Trial) -> None:
        assert self.open_trial is not None
        final_loss = (
            trial.losses[max(trial.losses)] if trial.losses and trial.state != "failed" else None
        )
        self.study.tell(
            self.open_trial,
            final_loss if trial.state == "done" else None,
            TRIAL_STATES[trial.state],
        )

    def restore_trial(self, trial: Trial) -> None:
        """Add a trial of an earlier attempt to the study."""
        self.trial_count = trial.number + 1
        completed_rungs = {
            f"completed_rung_{index}": trial.losses[step]
            for index, step in enumerate(self.rungs)
            if step in trial.losses
        }
        frozen_trial = optuna.trial.create_trial(
            state=TRIAL_STATES[trial.state],
            value=trial.losses[max(trial.losses)] if trial.state == "done" else None,
            params=trial.params,
            distributions={name: self.space[name] for name in trial.params},
            intermediate_values=dict(trial.losses),
            system_attrs=completed_rungs,
        )
        self.study.add_trial(frozen_trial)


def build_search_space(config: RunConfig, module_sets: list[str]) -> dict[str, BaseDistribution]:
    varied = [name.strip() for name in config.tuning_search_space.split(",")]
    learning_rate = config.learning_rate
    space: dict[str, BaseDistribution] = {
        "learning_rate": FloatDistribution(
            max(1e-8, learning_rate / LEARNING_RATE_FACTOR),
            min(1.0, learning_rate * LEARNING_RATE_FACTOR),
            log=True,
        ),
        "rank": CategoricalDistribution(list_candidate_ranks(config.rank)),
        # Multiples of the rank
        "alpha": CategoricalDistribution(sorted({1.0, 2.0, config.alpha / config.rank})),
        "target_modules": CategoricalDistribution(module_sets),
    }
    return {
        name: space[name] for name in varied if name != "target_modules" or len(module_sets) > 1
    }


def get_initial_params(config: RunConfig, space: dict[str, BaseDistribution]) -> dict[str, Any]:
    guess = {name: getattr(config, name) for name in space}
    return guess | ({"alpha": config.alpha / config.rank} if "alpha" in space else {})


def params_to_settings(config: RunConfig, params: dict[str, Any]) -> dict[str, Any]:
    """Convert Optuna's parameters to settings. Settings that are not varied keep their value.
    Optuna's alpha is a multiple of the rank.
    """
    rank = params.get("rank", config.rank)
    alpha = min(4096, max(1, round(params["alpha"] * rank))) if "alpha" in params else config.alpha
    learning_rate = config.learning_rate
    if "learning_rate" in params and params["learning_rate"] != learning_rate:
        learning_rate = float(f"{params['learning_rate']:.3g}")
    modules = params.get("target_modules", config.target_modules)
    return {"learning_rate": learning_rate, "rank": rank, "alpha": alpha, "target_modules": modules}


def compute_rungs(budget: int, config: RunConfig, total_steps: int) -> list[int]:
    """Steps at which trials are compared. A complete trial takes about a quarter of the budget;
    stopped trials take half or a quarter of that.

    No rung lies within the warmup, where all learning rates give similar losses.
    """
    warmup_steps = math.ceil(config.warmup_ratio * total_steps)
    full_steps = max(4, min(budget // 4, total_steps // 2))
    first_rung = max(
        1,
        full_steps // REDUCTION_FACTOR**2,
        min(warmup_steps + max(2, warmup_steps // 2), total_steps // 2),
    )
    rungs = [first_rung]
    while (
        rungs[-1] * REDUCTION_FACTOR <= max(full_steps, first_rung * REDUCTION_FACTOR)
        and rungs[-1] * REDUCTION_FACTOR <= total_steps
    ):
        rungs.append(rungs[-1] * REDUCTION_FACTOR)
    return rungs


def compare_trials(baseline: Trial, winner: Trial, tokens: list[int]) -> tuple[float, float]:
    """How much lower the winner's loss is than the baseline's on the comparison rows, and the
    standard error of that difference.

    Both are in nats per trained token. The standard error is that of a ratio estimator over rows
    drawn at random, paired by row.
    """
    differences = [
        a - b for a, b in zip(baseline.comparison_losses, winner.comparison_losses, strict=True)
    ]
    count, total = len(differences), sum(tokens)
    mean = sum(differences) / count
    spread = sum(
        (d - mean * t * count / total) ** 2 for d, t in zip(differences, tokens, strict=True)
    )
    return sum(differences) / total, math.sqrt(spread * count / max(1, count - 1)) / total
