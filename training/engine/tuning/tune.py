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
from training.engine.train.loop import Diverged, save, take_step
from training.engine.train.session import Event, Session, equipped
from training.engine.tuning.search import Search, Trial, kept_trials, rungs_of
from training.engine.tuning.selection import (
    better,
    chosen,
    chosen_config,
    forget_states,
    keep_state,
    verdict_of,
    write_chosen,
)

FEWEST_ROWS = 8  # held out: below, the halves say nothing
TIMED_STEPS = 3

Told = Generator[Event, None, Outcome | None]


@dataclass
class Bench:
    """What all trials share. `seeing` rows choose, `unseen` ones compare; `spent` and `budget` are
    steps.

    Minutes are made steps by the first three, and after each trial by what the trials really took.
    """

    session: Session
    search: Search
    seeing: list[EncodedRow]
    unseen: list[EncodedRow]
    budget: int
    spent: int = 0
    seconds: float = 0.0
    fresh: bool = True  # the session stands at step 0 with the plan's own settings

    def count(self, trial: Trial) -> None:
        """A trial's seconds, with all that a step alone does not show: measuring, saving, wrapping
        anew.
        """
        self.seconds += trial.seconds
        minutes = self.session.config.tuning_budget_minutes
        if minutes and self.seconds:
            self.budget = round(self.spent * 60 * minutes / self.seconds)

    def progress(self) -> dict[str, int]:
        return {"done": min(self.spent, self.budget), "total": self.budget}


def tune(session: Session, reins: StopSignals) -> Told:
    """Run trials until the budget is spent; leaves the session as the winner at its last step.
    Returns an order to end, or None.

    Raises:
        DataError: too few held-out rows to choose by.
    """
    if len(session.heldout) < FEWEST_ROWS:
        raise DataError(
            f"Trials compare held-out losses, and {len(session.heldout)} held-out rows are too "
            f"few; hold out {FEWEST_ROWS} or more, or switch the trials off.",
            field="tuning_budget_fraction",
        )
    known = list(kept_trials(session.run_dir))
    yield from evaluate.heldout(session)
    yield from evaluate.sample(session)
    yield "phase", {"name": "preparing trials"}
    bench = bench_of(session, known)
    best: Trial | None = None
    for trial in known:
        yield "trial", trial_payload(bench, trial)
        bench.search.recall(trial)
        bench.spent += max(1, trial.step)
        bench.count(trial)
        best = better(best, trial)
    while bench.spent < bench.budget or not bench.search.count:
        trial = bench.search.ask()
        order = yield from run_trial(bench, trial, reins)
        if order is not None:
            return order
        bench.search.tell(trial)
        bench.count(trial)
        best = better(best, trial)
        if best is trial or (trial.number == 0 and trial.state == "done"):
            keep_state(session, trial)
        trial.write(session.run_dir)
        forget_states(session.run_dir, keep=(0, best.number if best else 0))
    yield from choose(bench, best)
    return None


def bench_of(session: Session, known: list[Trial]) -> Bench:
    config, total = session.config, session.plan.total_steps
    budget = round(config.tuning_budget_fraction * total)
    if config.tuning_budget_minutes:
        budget = round(60 * config.tuning_budget_minutes / seconds_a_step(session))
    rungs = (
        list(known[0].losses)
        if known and known[0].state == "done"
        else rungs_of(budget, config, total)
    )
    search = Search(config, layer_sets(session.model, config), rungs, seed=config.seed + len(known))
    return Bench(
        session, search, session.heldout[0::2], session.heldout[1::2], budget, fresh=not known
    )


def seconds_a_step(session: Session) -> float:
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


def layer_sets(model: Any, config: RunConfig) -> list[str]:
    """The plan's layers; and those of attention alone and of the feed-forward part alone, where
    their names differ.
    """
    found: dict[str, set[str]] = {"attn": set(), "mlp": set()}
    for name in (
        name.removesuffix(".lora_A")
        for name, _ in model.named_modules()
        if name.endswith(".lora_A")
    ):
        part = "attn" if "attn" in name or "attention" in name else "mlp"
        found[part].add(name.rsplit(".", 1)[-1])
    if not all(found.values()) or found["attn"] & found["mlp"]:
        return [config.target_modules]
    return [config.target_modules, *(",".join(sorted(names)) for names in found.values())]


def run_trial(bench: Bench, trial: Trial, reins: StopSignals) -> Told:
    """Train a trial from rung to rung, until it is done, stopped early or failed. The first one is
    the session as it stands.
    """
    session, began = bench.session, time.monotonic()
    yield "trial", trial_payload(bench, trial)
    try:
        if not bench.fresh:
            wrap_again(session, {**trial.settings})
        bench.fresh = False
        for rung in bench.search.rungs:
            while session.step < rung:
                order = reins.requested_stop()
                if order is not None:
                    return order
                trial.steps.append(take_step(session)[1])
                bench.spent += 1
                yield "phase", {"name": f"trial {trial.number + 1}", **bench.progress()}
            loss = sum(row_losses(session, bench.seeing)) / sum(row.trained for row in bench.seeing)
            if not math.isfinite(loss):
                raise Diverged(f"Its held-out loss became {loss:g} at step {rung}.")
            trial.losses[rung] = loss
            if not bench.search.goes_on(trial, loss):
                trial.state = "stopped"
                break
            if rung != bench.search.rungs[-1]:
                yield "trial", trial_payload(bench, trial)
        else:
            trial.state = "done"
            trial.unseen = row_losses(session, bench.unseen)
    except (Diverged, torch.OutOfMemoryError) as error:
        if trial.number == 0 and not trial.steps:
            raise  # it is the run as it was planned, and cannot take one step
        trial.state = "failed"
        bench.spent += not trial.steps
        yield "log", {"level": "warning", "text": f"Trial {trial.number + 1} failed: {error}"}
    trial.seconds = time.monotonic() - began
    yield "trial", trial_payload(bench, trial)
    return None


def trial_payload(bench: Bench, trial: Trial) -> dict[str, Any]:
    """What a `trial` event tells. Losses by step, nats per trained token."""
    return {
        "number": trial.number,
        "step": 0,  # of the run, which has not begun
        "settings": trial.settings,
        "steps": trial.step,
        "losses": [[step, loss] for step, loss in trial.losses.items()],
        "outcome": trial.state,
        "spent": bench.spent,
        "budget": bench.budget,
        "full_steps": bench.search.rungs[-1],
        "seconds": trial.seconds,
    }


def wrap_again(session: Session, settings: dict[str, Any]) -> None:
    """The same base with a new adapter at step 0."""
    session.head.remove_hook()
    base = session.model.unload()
    session.optimizer.zero_grad(set_to_none=True)
    del session.optimizer
    gc.collect()
    session.config = replace(session.config, **settings)
    torch.manual_seed(session.config.seed)
    session.model = equipped(base, session.config, session.device)
    session.model.train()
    session.head = LabeledPositionsHead(session.model)
    session.optimizer = optimizers.make_optimizer(session.model, session.config, session.device)
    session.step = session.saved_step = session.total_tokens = 0
    session.loss = None


def row_losses(session: Session, rows: list[EncodedRow]) -> list[float]:
    """Sum of the cross entropy of each row, in nats: batches hold one row, so that rows can be
    compared in pairs.
    """
    pad, device = session.tokenizer.pad_token_id, session.device
    with evaluate.evaluating(session.model):
        return [
            float(
                session.head.compute_loss_sum(
                    session.model, *evaluate.collate([(place,)], rows, pad, device)
                )
            )
            for place in range(len(rows))
        ]


def choose(bench: Bench, best: Trial | None) -> Generator[Event, None, None]:
    """Say who won and by how much, put the winner's state into the session, and let the run go on
    from there.
    """
    session = bench.session
    plan = next(iter(kept_trials(session.run_dir)))
    if best is None:
        raise Diverged(
            "Not one trial got to its end; a lower learning rate or less memory is the usual cure."
        )
    verdict, winner = verdict_of(plan, best, [row.trained for row in bench.unseen])
    # First: an attempt that breaks off here rewinds to step 0, and these with it
    for step in winner.steps:
        yield "step", step
    wrap_again(session, winner.settings)
    payload = {
        **verdict,
        "step": winner.step,
        "settings": winner.settings,
        "spent": bench.spent,
        **size_of(session),
    }
    write_chosen(session.run_dir, payload, told=False)
    session.config = chosen_config(session.run_dir, session.config)
    newest = checkpoint.newest_whole(session.run_dir)
    if newest is not None:
        facts = checkpoint.load(newest, session.trained())
        session.step = facts.pop("step")
        session.total_tokens, session.loss = (
            winner.steps[-1]["total_tokens"],
            winner.steps[-1]["loss"],
        )
    yield from tell_chosen(session.run_dir)
    yield from evaluate.heldout(session)
    yield from evaluate.sample(session)
    yield from save(session)  # anew, with what was measured


def tell_chosen(run_dir: Path) -> Generator[Event, None, None]:
    """The `tuned` event, unless it is in the journal: an engine may be killed after it chose and
    before it told.
    """
    verdict = chosen(run_dir)
    if verdict is not None and not verdict.pop("told"):
        yield "tuned", verdict
        write_chosen(run_dir, verdict, told=True)


def size_of(session: Session) -> dict[str, int]:
    return {"trainable_parameters": session.trainable_parameters()}
