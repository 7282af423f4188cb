"""Which settings to try next, and which trial to stop early: Optuna's TPE and asynchronous
successive halving. No torch here.

The first trial is the plan's own guess and goes all the way: the others are measured against it (Li
et al. 2020, A System for Massively Parallel Hyperparameter Tuning; Bergstra et al. 2011, Algorithms
for Hyper-Parameter Optimization).
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
from training.engine.settings import candidate_ranks

FOLDER = "trials"
FACTOR = 2  # the better half goes on
RATES = 4.0  # a learning rate is tried up to so many times higher or lower
STATES = {"done": TrialState.COMPLETE, "stopped": TrialState.PRUNED, "failed": TrialState.FAIL}


@dataclass
class Trial:
    """`losses`: step -> held-out loss on the rows that trials are chosen by; `unseen`: loss sums of
    rows that choose nothing.
    """

    number: int
    settings: dict[str, Any]
    params: dict[str, Any]
    losses: dict[int, float] = field(default_factory=dict)
    state: str = "running"
    seconds: float = 0.0
    unseen: list[float] = field(default_factory=list)
    steps: list[dict[str, Any]] = field(default_factory=list)

    @property
    def step(self) -> int:
        return len(self.steps)

    def write(self, run_dir: Path) -> None:
        folder = run_dir / FOLDER
        folder.mkdir(exist_ok=True)
        write_atomically(folder / f"{self.number}.json", json.dumps(asdict(self)))


def kept_trials(run_dir: Path) -> Iterator[Trial]:
    """Those of an earlier attempt, in order."""
    for path in sorted((run_dir / FOLDER).glob("*.json"), key=lambda path: int(path.stem)):
        told = json.loads(path.read_text())
        yield Trial(
            **{**told, "losses": {int(step): loss for step, loss in told["losses"].items()}}
        )


class Search:
    """`modules` are sets of layers to choose from, the plan's own first; after `rungs` steps trials
    are compared.
    """

    def __init__(
        self, config: RunConfig, modules: list[str], rungs: list[int], *, seed: int
    ) -> None:
        self.config = config
        self.rungs = rungs
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        pruner = optuna.pruners.SuccessiveHalvingPruner(
            min_resource=rungs[0], reduction_factor=FACTOR
        )
        sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=4)
        self.study = optuna.create_study(sampler=sampler, pruner=pruner)
        self.space = space_of(config, modules)
        self.open: optuna.Trial | None = None
        self.count = 0

    def ask(self) -> Trial:
        """The plan's guess first, then what looks best."""
        if self.count == 0:
            self.study.enqueue_trial(guess_of(self.config, self.space))
        self.open = self.study.ask(self.space)
        trial = Trial(self.count, settings_of(self.config, self.open.params), self.open.params)
        self.count += 1
        return trial

    def goes_on(self, trial: Trial, loss: float) -> bool:
        """Report a trial's loss at its step: does it belong to the better half so far?"""
        assert self.open is not None
        self.open.report(loss, trial.step)
        # Asked of the first one, too: the others are compared with it
        prune = self.open.should_prune()
        return trial.number == 0 or not prune

    def tell(self, trial: Trial) -> None:
        assert self.open is not None
        last = trial.losses[max(trial.losses)] if trial.losses and trial.state != "failed" else None
        self.study.tell(self.open, last if trial.state == "done" else None, STATES[trial.state])

    def recall(self, trial: Trial) -> None:
        """A trial of an earlier attempt."""
        self.count = trial.number + 1
        rungs = {
            f"completed_rung_{place}": trial.losses[at]
            for place, at in enumerate(self.rungs)
            if at in trial.losses
        }
        made = optuna.trial.create_trial(
            state=STATES[trial.state],
            value=trial.losses[max(trial.losses)] if trial.state == "done" else None,
            params=trial.params,
            distributions={name: self.space[name] for name in trial.params},
            intermediate_values=dict(trial.losses),
            system_attrs=rungs,
        )
        self.study.add_trial(made)


def space_of(config: RunConfig, modules: list[str]) -> dict[str, BaseDistribution]:
    over = [name.strip() for name in config.tuning_search_space.split(",")]
    rate = config.learning_rate
    space: dict[str, BaseDistribution] = {
        "learning_rate": FloatDistribution(
            max(1e-8, rate / RATES), min(1.0, rate * RATES), log=True
        ),
        "rank": CategoricalDistribution(candidate_ranks(config.rank)),
        "alpha": CategoricalDistribution(
            sorted({1.0, 2.0, config.alpha / config.rank})
        ),  # times the rank
        "target_modules": CategoricalDistribution(modules),
    }
    return {name: space[name] for name in over if name != "target_modules" or len(modules) > 1}


def guess_of(config: RunConfig, space: dict[str, BaseDistribution]) -> dict[str, Any]:
    guess = {name: getattr(config, name) for name in space}
    return guess | ({"alpha": config.alpha / config.rank} if "alpha" in space else {})


def settings_of(config: RunConfig, params: dict[str, Any]) -> dict[str, Any]:
    """A trial's settings: what is not varied stays as it is. Alpha is told as a multiple of the
    rank.
    """
    rank = params.get("rank", config.rank)
    alpha = min(4096, max(1, round(params["alpha"] * rank))) if "alpha" in params else config.alpha
    rate = config.learning_rate
    if "learning_rate" in params and params["learning_rate"] != rate:
        rate = float(f"{params['learning_rate']:.3g}")
    modules = params.get("target_modules", config.target_modules)
    return {"learning_rate": rate, "rank": rank, "alpha": alpha, "target_modules": modules}


def rungs_of(budget: int, config: RunConfig, total: int) -> list[int]:
    """Steps at which trials are compared: a whole trial takes about a quarter of the budget, others
    half or a fourth of that.

    Nobody is judged before the warm-up is over, when every rate looks alike.
    """
    warm = math.ceil(config.warmup_ratio * total)
    whole = max(4, min(budget // 4, total // 2))
    first = max(1, whole // FACTOR**2, min(warm + max(2, warm // 2), total // 2))
    rungs = [first]
    while rungs[-1] * FACTOR <= max(whole, first * FACTOR) and rungs[-1] * FACTOR <= total:
        rungs.append(rungs[-1] * FACTOR)
    return rungs


def compare(plan: Trial, winner: Trial, tokens: list[int]) -> tuple[float, float]:
    """How much lower the winner's loss is than the plan's on rows that no trial was chosen by, and
    the standard error of that.

    Nats per trained token; the error is that of a ratio whose rows were drawn at random (paired by
    row).
    """
    differences = [a - b for a, b in zip(plan.unseen, winner.unseen, strict=True)]
    count, total = len(differences), sum(tokens)
    mean = sum(differences) / count
    spread = sum(
        (d - mean * t * count / total) ** 2 for d, t in zip(differences, tokens, strict=True)
    )
    return sum(differences) / total, math.sqrt(spread * count / max(1, count - 1)) / total
