"""The rules of a plan, one a setting, each with where it comes from. They fill a Draft in the order
of training/auto/plan.py.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from training.auto.situation import GOALS, Draft
from training.engine.config import RunConfig
from training.engine.methods import METHODS
from training.engine.settings import TUNABLE_SETTINGS
from training.errors import UserError
from training.formatting import format_setting

MANUAL = "LoRA Without Regret, Schulman et al. 2025"
MOST_CUT = 0.01
MOST_RANK = 128
FEW_ROWS = 200
SHORT_RUN = 100  # steps
SPARE = 0.05  # of the free memory; the forecast's worst error is about as much (docs/benchmarks.md)
MEASUREMENTS = 10
QUIET_HELDOUT = 20  # rows: with fewer, the held-out loss jumps too much to stop by it


def up_to(value: float, multiple: int) -> int:
    return max(multiple, math.ceil(value / multiple) * multiple)


def max_length(draft: Draft) -> int:
    """The shortest multiple of 64 that cuts at most 1 % of the rows; the longest row itself if that
    is nearly as short.
    """
    at = draft.situation
    longest = int(at.lengths.max())
    usual = int(np.sort(at.lengths)[math.ceil((1 - MOST_CUT) * len(at.lengths)) - 1])
    wanted = up_to(longest if longest <= 1.5 * usual else usual, 64)
    limit = min(
        (at.context_length or 131_072) - tokens_in_front(draft),
        131_072,
        draft.locked.get("max_tokens_per_batch", 131_072),
    )
    value = min(wanted, limit)
    share = at.cut_share(value)
    why = f"Rows have {int(np.median(at.lengths)):,} tokens in the middle and {longest:,} at most; "
    why += "none is cut off." if not share else f"{100 * share:.1f} % are cut off here."
    if value < wanted:
        why += f" No more than {limit:,} go through {at.model} at once."
    instead = (
        f"{longest:,} would keep the few longest rows whole, and make room for them in memory."
        if share
        else ""
    )
    if not share:
        half = up_to(longest / 2, 64)
        instead = (
            f"{half:,} would cut off {100 * at.cut_share(half):.0f} % of the rows."
            if longest > 64
            else "More changes nothing."
        )
    source = "the data; rows that are cut off lose the end of their answers"
    return int(draft.take("max_length", value, why, instead=instead, source=source))


def tokens_in_front(draft: Draft) -> int:
    """Of a locked technique."""
    locked = {
        name: draft.locked[name] for name in ("method", "num_virtual_tokens") if name in draft.locked
    }
    return RunConfig.from_dict(locked).prepended_tokens


def rank(draft: Draft) -> int:
    """By what the adapter is for, then by what the data holds: an update keeps 2 bits a parameter,
    a token brings about 1.
    """
    at = draft.situation
    value, words = GOALS[draft.goal]
    why = f"{value} is usual for {words}."
    bits = at.trained_tokens
    if at.rows < FEW_ROWS and value > 8:
        value = 8
        why = f"Only {at.rows:,} rows: a larger update would learn them by heart."
    while value < MOST_RANK and 2 * value * at.parameters_a_rank < bits:
        value *= 2
        why = (
            f"{at.trained_tokens:,} trained tokens hold about that many bits; rank {value} can "
            "keep "
        )
        why += f"{2 * value * at.parameters_a_rank:,}, half of it could not."
    if 2 * value * at.parameters_a_rank < bits:
        why = (
            f"{MOST_RANK} is the most a plan takes, although {bits:,} trained tokens hold more: "
            "beyond it, full fine-tuning pays."
        )
    instead = f"{2 * value} would train {2 * value * at.parameters_a_rank:,} parameters instead of "
    instead += f"{value * at.parameters_a_rank:,}, in more memory."
    return int(draft.take("rank", value, why, instead=instead, source=MANUAL))


def alpha(draft: Draft, rank: int) -> int:
    why = f"Twice the rank: the update is scaled by {2 * rank} / {rank} = 2, whatever the rank."
    instead = f"{rank} would scale it by 1; the learning rate would have to rise."
    return int(
        draft.take(
            "alpha",
            2 * rank,
            why,
            instead=instead,
            source="the guides of Unsloth and LLaMA-Factory",
        )
    )


def target_modules(draft: Draft) -> str:
    why = (
        "Every linear layer: an adapter on attention alone learns less, even with as many "
        "parameters."
    )
    instead = (
        "q_proj,v_proj, as the first LoRA paper had it, trains a fifth of that and ends at "
        "a higher loss."
    )
    source = f"QLoRA, Dettmers et al. 2023, figure 2; {MANUAL}"
    return str(draft.take("target_modules", "all-linear", why, instead=instead, source=source))


def epochs(draft: Draft) -> int:
    rows = draft.situation.rows
    if rows < 2_000:
        value = 3
        why = "few: seen three times they are learned, and the best moment is kept."
    elif rows < 20_000:
        value, why = 2, "enough for two rounds."
    else:
        value, why = 1, "many: seeing each once is enough."
    why = f"{rows:,} rows are {why}"
    instead = (
        "5 would mostly learn the rows by heart."
        if value == 3
        else f"{value + 1} would take {100 // value} % longer."
    )
    return int(
        draft.take(
            "epochs",
            value,
            why,
            instead=instead,
            source="Alpaca, Taori et al. 2023 (3); Unsloth's guide (1 to 3)",
        )
    )


def max_steps(draft: Draft) -> None:
    instead = "60 would be a first try."
    draft.take(
        "max_steps",
        0,
        "0: it ends after the epochs.",
        instead=instead,
        source="Unsloth's guide (60 for a try)",
    )


def rows_a_step(draft: Draft, epochs: int) -> int:
    """A power of two from 4 to 16, small enough for 100 steps. LoRA suffers from large batches more
    than full fine-tuning.
    """
    wanted = draft.situation.rows * epochs / SHORT_RUN
    return int(2 ** min(4, max(2, math.floor(math.log2(max(1.0, wanted))))))


def learning_rate(draft: Draft, config: RunConfig) -> float:
    """LoRA: 2e-4 at 4,096 features, larger for narrower models as (4,096 / width)^0.775, and half
    as much more in short runs.
    """
    at, method = draft.situation, METHODS[config.method]
    width = (4096 / at.hidden_size) ** 0.775
    source = f"{MANUAL}: rate by width, fitted on Llama models; ten times that of full fine-tuning"
    if method.is_full_finetuning:
        value = rounded(min(5e-5, max(5e-6, 1e-5 * width)))
        why = (
            f"1e-5 is usual at 7B; {at.model} is {at.hidden_size:,} features wide, and narrower "
            "models stand more."
        )
    elif "rank" in method.settings:
        short = at.steps(config) < SHORT_RUN
        value = rounded(min(2e-3, max(1e-4, 2e-4 * width * (1.5 if short else 1.0))))
        why = (
            f"2e-4 is usual at 4,096 features; {at.model} has {at.hidden_size:,}, and narrower "
            "models stand more."
        )
        why += " Half as much again, since the run is short." if short else ""
    else:
        value, source = (
            float(RunConfig.from_dict({"method": config.method}).learning_rate),
            method.paper,
        )
        why = (
            f"What is usual for {method.title.lower()}, which trains few numbers and stands a "
            "high rate."
        )
    instead = (
        f"{format_setting(rounded(value / 3))} would learn slower; "
        f"{format_setting(rounded(value * 3))} may make the loss jump."
    )
    return float(draft.take("learning_rate", value, why, instead=instead, source=source))


def rounded(value: float) -> float:
    """To two digits: 0.000914 -> 9.1e-4."""
    return float(f"{value:.1e}") if value < 1 else value


def schedule(draft: Draft) -> None:
    why = "Falls smoothly to zero, so that the last steps settle."
    draft.take(
        "lr_scheduler_type",
        "cosine",
        why,
        instead="constant would leave the last steps noisy.",
        source="QLoRA and most guides",
    )
    why = "The first 5 % of the steps rise from zero, while AdamW learns how large gradients are."
    instead = "0 would begin at the whole rate, with averages of one batch."
    draft.take(
        "warmup_ratio",
        0.05,
        why,
        instead=instead,
        source="Liu et al. 2020, On the Variance of the Adaptive Learning Rate",
    )


def measuring(draft: Draft, config: RunConfig) -> None:
    """Ten measurements a run, and an early end when three of them bring nothing."""
    at = draft.situation
    steps = max(1, at.steps(config))
    why = f"Ten measurements in about {steps:,} steps."
    often = steps // 50
    instead = (
        f"{often:,} would spend more time on measuring."
        if often
        else f"{max(2, steps // 5):,} would show less of the run."
    )
    source = "a tenth of the run shows where the loss turns"
    interval = int(
        draft.take(
            "eval_steps", max(1, steps // MEASUREMENTS), why, instead=instead, source=source
        )
    )
    why, instead = (
        "A checkpoint with each measurement, so that the best one is kept.",
        "Seldom would lose more steps to a crash.",
    )
    draft.take(
        "save_steps",
        interval,
        why,
        instead=instead,
        source="every measured loss has its weights",
    )
    quiet = at.heldout_rows >= QUIET_HELDOUT
    enough = steps >= 4 * MEASUREMENTS and steps > 3 * interval
    if not quiet:
        why = f"Off: {at.heldout_rows} held-out rows are too few to stop by."
    elif not enough:
        why = f"Off: about {steps} steps are too few to stop early."
    else:
        why = (
            "Stops when the held-out loss has not improved in 3 measurements: what follows would "
            "be learned by heart."
        )
    instead = (
        "0 would train to the end."
        if quiet and enough
        else "3 would stop by chance, or not at all."
    )
    draft.take(
        "early_stopping_patience",
        3 if quiet and enough else 0,
        why,
        instead=instead,
        source="Prechelt 1998, Early Stopping, But When?",
    )


def trials(draft: Draft, config: RunConfig) -> None:
    """Off unless asked for: trials take time that the person should agree to. They vary what is not
    locked.
    """
    if "tuning_budget_fraction" not in METHODS[config.method].settings:
        return
    over = [name for name in TUNABLE_SETTINGS if name not in draft.locked]
    instead = "0.3 spends 30 % more steps on short trials that look for a better one."
    why = "Off: the plan's guess is used as it is."
    draft.take(
        "tuning_budget_fraction",
        0.0,
        why,
        instead=instead,
        source="Li et al. 2020, A System for Massively Parallel Hyperparameter Tuning",
    )
    if not over and draft.locked.get("tuning_budget_fraction"):
        raise UserError(
            "Everything that trials vary is locked; unlock one of them, or lock no trials.",
            field="tuning_budget_fraction",
        )
    if "tuning_search_space" in draft.locked or (over and len(over) < len(TUNABLE_SETTINGS)):
        instead = "All four are varied where nothing is locked."
        draft.take(
            "tuning_search_space",
            ",".join(over),
            "What is locked is not varied.",
            instead=instead,
            source="your locks",
        )


def numbers(need: Any) -> dict[str, Any]:
    """What of a forecast a plan keeps."""
    return {
        name: need[name] for name in ("peak", "precision", "optimizer", "trainable") if name in need
    }
