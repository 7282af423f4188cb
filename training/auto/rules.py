"""The rules of a plan, one a setting, each with where it comes from. They fill a Draft in the order
of training/auto/plan.py.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from training.auto.plan_types import GOALS, PlanDraft
from training.engine.config import RunConfig
from training.engine.methods import METHODS
from training.engine.settings import TUNABLE_SETTINGS
from training.errors import UserError
from training.formatting import format_setting

LORA_GUIDE = "LoRA Without Regret, Schulman et al. 2025"
MAX_TRUNCATED_SHARE = 0.01
MAX_RANK = 128
FEW_ROWS = 200
SHORT_RUN_STEPS = 100  # steps
MEMORY_MARGIN = (
    0.05  # of the free memory; the forecast's worst error is about as much (docs/benchmarks.md)
)
EVALS_PER_RUN = 10
MIN_STABLE_EVAL_ROWS = 20  # rows: with fewer, the held-out loss jumps too much to stop by it


def round_up(value: float, multiple: int) -> int:
    return max(multiple, math.ceil(value / multiple) * multiple)


def choose_max_length(draft: PlanDraft) -> int:
    """The shortest multiple of 64 that cuts at most 1 % of the rows; the longest row itself if that
    is nearly as short.
    """
    inputs = draft.inputs
    longest = int(inputs.lengths.max())
    typical = int(
        np.sort(inputs.lengths)[math.ceil((1 - MAX_TRUNCATED_SHARE) * len(inputs.lengths)) - 1]
    )
    wanted = round_up(longest if longest <= 1.5 * typical else typical, 64)
    limit = min(
        (inputs.context_length or 131_072) - count_virtual_tokens(draft),
        131_072,
        draft.locked.get("max_tokens_per_batch", 131_072),
    )
    value = min(wanted, limit)
    truncated_share = inputs.truncated_share(value)
    why = f"Rows have {int(np.median(inputs.lengths)):,} tokens in the middle and {longest:,} at most; "
    why += (
        "none is cut off."
        if not truncated_share
        else f"{100 * truncated_share:.1f} % are cut off here."
    )
    if value < wanted:
        why += f" No more than {limit:,} go through {inputs.model} at once."
    alternative = (
        f"{longest:,} would keep the few longest rows whole, and make room for them in memory."
        if truncated_share
        else ""
    )
    if not truncated_share:
        half = round_up(longest / 2, 64)
        alternative = (
            f"{half:,} would cut off {100 * inputs.truncated_share(half):.0f} % of the rows."
            if longest > 64
            else "More changes nothing."
        )
    source = "the data; rows that are cut off lose the end of their answers"
    return int(
        draft.choose_setting("max_length", value, why, alternative=alternative, source=source)
    )


def count_virtual_tokens(draft: PlanDraft) -> int:
    """Of a locked technique."""
    locked = {
        name: draft.locked[name]
        for name in ("method", "num_virtual_tokens")
        if name in draft.locked
    }
    return RunConfig.from_dict(locked).prepended_tokens


def choose_rank(draft: PlanDraft) -> int:
    """By what the adapter is for, then by what the data holds: an update keeps 2 bits a parameter,
    a token brings about 1.
    """
    inputs = draft.inputs
    value, description = GOALS[draft.goal]
    why = f"{value} is usual for {description}."
    bits = inputs.trained_tokens
    if inputs.rows < FEW_ROWS and value > 8:
        value = 8
        why = f"Only {inputs.rows:,} rows: a larger update would learn them by heart."
    while value < MAX_RANK and 2 * value * inputs.parameters_per_rank < bits:
        value *= 2
        why = (
            f"{inputs.trained_tokens:,} trained tokens hold about that many bits; rank {value} can "
            "keep "
        )
        why += f"{2 * value * inputs.parameters_per_rank:,}, half of it could not."
    if 2 * value * inputs.parameters_per_rank < bits:
        why = (
            f"{MAX_RANK} is the most a plan takes, although {bits:,} trained tokens hold more: "
            "beyond it, full fine-tuning pays."
        )
    alternative = (
        f"{2 * value} would train {2 * value * inputs.parameters_per_rank:,} parameters instead of "
    )
    alternative += f"{value * inputs.parameters_per_rank:,}, in more memory."
    return int(draft.choose_setting("rank", value, why, alternative=alternative, source=LORA_GUIDE))


def choose_alpha(draft: PlanDraft, rank: int) -> int:
    why = f"Twice the rank: the update is scaled by {2 * rank} / {rank} = 2, whatever the rank."
    alternative = f"{rank} would scale it by 1; the learning rate would have to rise."
    return int(
        draft.choose_setting(
            "alpha",
            2 * rank,
            why,
            alternative=alternative,
            source="the guides of Unsloth and LLaMA-Factory",
        )
    )


def choose_target_modules(draft: PlanDraft) -> str:
    why = (
        "Every linear layer: an adapter on attention alone learns less, even with as many "
        "parameters."
    )
    alternative = (
        "q_proj,v_proj, as the first LoRA paper had it, trains a fifth of that and ends at "
        "a higher loss."
    )
    source = f"QLoRA, Dettmers et al. 2023, figure 2; {LORA_GUIDE}"
    return str(
        draft.choose_setting(
            "target_modules", "all-linear", why, alternative=alternative, source=source
        )
    )


def choose_epochs(draft: PlanDraft) -> int:
    rows = draft.inputs.rows
    if rows < 2_000:
        value = 3
        why = "few: seen three times they are learned, and the best moment is kept."
    elif rows < 20_000:
        value, why = 2, "enough for two rounds."
    else:
        value, why = 1, "many: seeing each once is enough."
    why = f"{rows:,} rows are {why}"
    alternative = (
        "5 would mostly learn the rows by heart."
        if value == 3
        else f"{value + 1} would take {100 // value} % longer."
    )
    return int(
        draft.choose_setting(
            "epochs",
            value,
            why,
            alternative=alternative,
            source="Alpaca, Taori et al. 2023 (3); Unsloth's guide (1 to 3)",
        )
    )


def choose_max_steps(draft: PlanDraft) -> None:
    alternative = "60 would be a first try."
    draft.choose_setting(
        "max_steps",
        0,
        "0: it ends after the epochs.",
        alternative=alternative,
        source="Unsloth's guide (60 for a try)",
    )


def compute_rows_per_step(draft: PlanDraft, epochs: int) -> int:
    """A power of two from 4 to 16, small enough for 100 steps. LoRA suffers from large batches more
    than full fine-tuning.
    """
    wanted = draft.inputs.rows * epochs / SHORT_RUN_STEPS
    return int(2 ** min(4, max(2, math.floor(math.log2(max(1.0, wanted))))))


def choose_learning_rate(draft: PlanDraft, config: RunConfig) -> float:
    """LoRA: 2e-4 at 4,096 features, larger for narrower models as (4,096 / width)^0.775, and half
    as much more in short runs.
    """
    inputs, method = draft.inputs, METHODS[config.method]
    width_factor = (4096 / inputs.hidden_size) ** 0.775
    source = (
        f"{LORA_GUIDE}: rate by width, fitted on Llama models; ten times that of full fine-tuning"
    )
    if method.is_full_finetuning:
        value = round_rate(min(5e-5, max(5e-6, 1e-5 * width_factor)))
        why = (
            f"1e-5 is usual at 7B; {inputs.model} is {inputs.hidden_size:,} features wide, and narrower "
            "models stand more."
        )
    elif "rank" in method.settings:
        is_short = inputs.count_steps(config) < SHORT_RUN_STEPS
        value = round_rate(min(2e-3, max(1e-4, 2e-4 * width_factor * (1.5 if is_short else 1.0))))
        why = (
            f"2e-4 is usual at 4,096 features; {inputs.model} has {inputs.hidden_size:,}, and narrower "
            "models stand more."
        )
        why += " Half as much again, since the run is short." if is_short else ""
    else:
        value, source = (
            float(RunConfig.from_dict({"method": config.method}).learning_rate),
            method.paper,
        )
        why = (
            f"What is usual for {method.title.lower()}, which trains few numbers and stands a "
            "high rate."
        )
    alternative = (
        f"{format_setting(round_rate(value / 3))} would learn slower; "
        f"{format_setting(round_rate(value * 3))} may make the loss jump."
    )
    return float(
        draft.choose_setting("learning_rate", value, why, alternative=alternative, source=source)
    )


def round_rate(value: float) -> float:
    """To two digits: 0.000914 -> 9.1e-4."""
    return float(f"{value:.1e}") if value < 1 else value


def choose_schedule(draft: PlanDraft) -> None:
    why = "Falls smoothly to zero, so that the last steps settle."
    draft.choose_setting(
        "lr_scheduler_type",
        "cosine",
        why,
        alternative="constant would leave the last steps noisy.",
        source="QLoRA and most guides",
    )
    why = "The first 5 % of the steps rise from zero, while AdamW learns how large gradients are."
    alternative = "0 would begin at the whole rate, with averages of one batch."
    draft.choose_setting(
        "warmup_ratio",
        0.05,
        why,
        alternative=alternative,
        source="Liu et al. 2020, On the Variance of the Adaptive Learning Rate",
    )


def choose_eval_settings(draft: PlanDraft, config: RunConfig) -> None:
    """Ten measurements a run, and an early end when three of them bring nothing."""
    inputs = draft.inputs
    steps = max(1, inputs.count_steps(config))
    why = f"Ten measurements in about {steps:,} steps."
    short_interval = steps // 50
    alternative = (
        f"{short_interval:,} would spend more time on measuring."
        if short_interval
        else f"{max(2, steps // 5):,} would show less of the run."
    )
    source = "a tenth of the run shows where the loss turns"
    interval = int(
        draft.choose_setting(
            "eval_steps",
            max(1, steps // EVALS_PER_RUN),
            why,
            alternative=alternative,
            source=source,
        )
    )
    why, alternative = (
        "A checkpoint with each measurement, so that the best one is kept.",
        "Seldom would lose more steps to a crash.",
    )
    draft.choose_setting(
        "save_steps",
        interval,
        why,
        alternative=alternative,
        source="every measured loss has its weights",
    )
    is_stable = inputs.eval_rows >= MIN_STABLE_EVAL_ROWS
    has_enough_steps = steps >= 4 * EVALS_PER_RUN and steps > 3 * interval
    if not is_stable:
        why = f"Off: {inputs.eval_rows} held-out rows are too few to stop by."
    elif not has_enough_steps:
        why = f"Off: about {steps} steps are too few to stop early."
    else:
        why = (
            "Stops when the held-out loss has not improved in 3 measurements: what follows would "
            "be learned by heart."
        )
    alternative = (
        "0 would train to the end."
        if is_stable and has_enough_steps
        else "3 would stop by chance, or not at all."
    )
    draft.choose_setting(
        "early_stopping_patience",
        3 if is_stable and has_enough_steps else 0,
        why,
        alternative=alternative,
        source="Prechelt 1998, Early Stopping, But When?",
    )


def choose_tuning(draft: PlanDraft, config: RunConfig) -> None:
    """Off unless asked for: trials take time that the person should agree to. They vary what is not
    locked.
    """
    if "tuning_budget_fraction" not in METHODS[config.method].settings:
        return
    varied = [name for name in TUNABLE_SETTINGS if name not in draft.locked]
    alternative = "0.3 spends 30 % more steps on short trials that look for a better one."
    why = "Off: the plan's guess is used as it is."
    draft.choose_setting(
        "tuning_budget_fraction",
        0.0,
        why,
        alternative=alternative,
        source="Li et al. 2020, A System for Massively Parallel Hyperparameter Tuning",
    )
    if not varied and draft.locked.get("tuning_budget_fraction"):
        raise UserError(
            "Everything that trials vary is locked; unlock one of them, or lock no trials.",
            field="tuning_budget_fraction",
        )
    if "tuning_search_space" in draft.locked or (varied and len(varied) < len(TUNABLE_SETTINGS)):
        alternative = "All four are varied where nothing is locked."
        draft.choose_setting(
            "tuning_search_space",
            ",".join(varied),
            "What is locked is not varied.",
            alternative=alternative,
            source="your locks",
        )


def summarize_forecast(forecast: Any) -> dict[str, Any]:
    """What of a forecast a plan keeps."""
    return {
        name: forecast[name]
        for name in ("peak", "precision", "optimizer", "trainable")
        if name in forecast
    }
