"""The rules of a plan: one function per setting or group, each with its source. plan.py calls them
in order; they add choices to a PlanDraft.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from training.auto.plan_types import GOALS, Choice, PlanDraft
from training.engine.config import ROW_SETTINGS, RunConfig
from training.engine.methods import METHODS
from training.engine.settings import TUNABLE_SETTINGS
from training.errors import UserError
from training.formatting import format_setting

LORA_GUIDE = "LoRA Without Regret, Schulman et al. 2025"
MAX_TRUNCATED_SHARE = 0.01
MAX_RANK = 128
FEW_ROWS = 200
SHORT_RUN_STEPS = 100
# Share of the free memory; the largest error of the forecast is about as much (docs/benchmarks.md)
MEMORY_MARGIN = 0.05
EVALS_PER_RUN = 10
MIN_STABLE_EVAL_ROWS = 20  # With fewer, the held-out loss is too noisy for early stopping


def round_up(value: float, multiple: int) -> int:
    return max(multiple, math.ceil(value / multiple) * multiple)


def choose_max_length(draft: PlanDraft) -> int:
    """The smallest multiple of 64 that truncates at most 1% of the rows, or none if the longest row
    is not much longer.
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
    median = int(np.median(inputs.lengths))
    why = f"The median row has {median:,} tokens, the longest {longest:,}. "
    why += (
        "None is truncated."
        if not truncated_share
        else f"{100 * truncated_share:.1f}% are truncated."
    )
    if value < wanted:
        why += f" {inputs.model} supports at most {limit:,} here."
    half = round_up(longest / 2, 64)
    if truncated_share:
        alternative = f"{longest:,} would truncate no row, but needs more memory."
    elif longest > 64:
        percent = 100 * inputs.truncated_share(half)
        alternative = f"{half:,} would truncate {percent:.0f}% of the rows."
    else:
        alternative = "More would change nothing."
    source = "the data; truncated rows lose the end of their answers"
    return int(
        draft.choose_setting("max_length", value, why, alternative=alternative, source=source)
    )


def count_virtual_tokens(draft: PlanDraft) -> int:
    """Virtual tokens of the method, if the user locked one."""
    locked = {
        name: draft.locked[name]
        for name in ("method", "num_virtual_tokens")
        if name in draft.locked
    }
    return RunConfig.from_dict(locked).prepended_tokens


def choose_rank(draft: PlanDraft) -> int:
    """Start with the rank of the goal, then raise it to the information in the data. An adapter
    stores about 2 bits per parameter, and a trained token has about 1 bit.
    """
    inputs = draft.inputs
    value, description = GOALS[draft.goal]
    why = f"{value} is typical for {description}."
    bits = inputs.trained_tokens
    if inputs.rows < FEW_ROWS and value > 8:
        value = 8
        why = f"Only {inputs.rows:,} rows: a larger adapter would overfit."
    while value < MAX_RANK and 2 * value * inputs.parameters_per_rank < bits:
        value *= 2
        why = (
            f"{bits:,} trained tokens have about as many bits. Rank {value} can store "
            f"{2 * value * inputs.parameters_per_rank:,}; half that rank could not."
        )
    if 2 * value * inputs.parameters_per_rank < bits:
        why = (
            f"{MAX_RANK} is the maximum of a plan, although {bits:,} trained tokens have more bits "
            "than it can store. Beyond it, use full fine-tuning."
        )
    alternative = (
        f"{2 * value} would train {2 * value * inputs.parameters_per_rank:,} parameters instead of "
    )
    alternative += f"{value * inputs.parameters_per_rank:,} and need more memory."
    return int(draft.choose_setting("rank", value, why, alternative=alternative, source=LORA_GUIDE))


def choose_alpha(draft: PlanDraft, rank: int) -> int:
    why = f"Twice the rank, so the update is scaled by {2 * rank} / {rank} = 2 at any rank."
    alternative = f"{rank} would scale it by 1 and need a higher learning rate."
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
        "All linear layers: an adapter on only the attention layers learns less, even with the "
        "same number of parameters."
    )
    alternative = (
        "q_proj,v_proj, as in the first LoRA paper, trains a fifth of the parameters and ends at a "
        "higher loss."
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
        why = f"{rows:,} rows are few, so training repeats them. The best checkpoint is kept."
    elif rows < 20_000:
        value, why = 2, f"{rows:,} rows need two epochs."
    else:
        value, why = 1, f"With {rows:,} rows, a single epoch is enough."
    alternative = (
        "5 would likely overfit."
        if value == 3
        else f"{value + 1} would take {100 // value}% longer."
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


def choose_rows(draft: PlanDraft) -> None:
    """Rows are left out only if the user says so."""
    for setting in ROW_SETTINGS:
        if setting in draft.locked:
            draft.choices.append(
                Choice(
                    setting,
                    draft.locked[setting],
                    "You set it.",
                    alternative="The plan would use all rows.",
                    locked=True,
                )
            )


def choose_max_steps(draft: PlanDraft) -> None:
    alternative = "60 would be a quick test."
    draft.choose_setting(
        "max_steps",
        0,
        "0: the number of epochs decides.",
        alternative=alternative,
        source="Unsloth's guide (60 for a test)",
    )


def compute_rows_per_step(draft: PlanDraft, epochs: int) -> int:
    """A power of two from 4 to 16, small enough for 100 steps. Large batches hurt LoRA more than
    full fine-tuning.
    """
    wanted = draft.inputs.rows * epochs / SHORT_RUN_STEPS
    return int(2 ** min(4, max(2, math.floor(math.log2(max(1.0, wanted))))))


def choose_learning_rate(draft: PlanDraft, config: RunConfig) -> float:
    """LoRA: 2e-4 at hidden size 4,096, scaled by (4,096 / hidden size)^0.775, and 1.5 times as much
    in short runs.
    """
    inputs, method = draft.inputs, METHODS[config.method]
    width_factor = (4096 / inputs.hidden_size) ** 0.775
    source = f"{LORA_GUIDE}: rate by hidden size, fitted on Llama models; 10 times full fine-tuning"
    if method.is_full_finetuning:
        value = round_rate(min(5e-5, max(5e-6, 1e-5 * width_factor)))
        why = (
            f"1e-5 is typical for 7B models. Smaller hidden sizes allow more; {inputs.model} has "
            f"{inputs.hidden_size:,}."
        )
    elif "rank" in method.settings:
        is_short = inputs.count_steps(config) < SHORT_RUN_STEPS
        value = round_rate(min(2e-3, max(1e-4, 2e-4 * width_factor * (1.5 if is_short else 1.0))))
        why = (
            f"2e-4 is typical at hidden size 4,096. Smaller sizes allow more; {inputs.model} has "
            f"{inputs.hidden_size:,}."
        )
        why += " It is 1.5 times as high because the run is short." if is_short else ""
    else:
        value, source = (
            float(RunConfig.from_dict({"method": config.method}).learning_rate),
            method.paper,
        )
        why = (
            f"The default of {method.title.lower()}, which trains few parameters and allows a high "
            "rate."
        )
    alternative = (
        f"{format_setting(round_rate(value / 3))} would learn more slowly; "
        f"{format_setting(round_rate(value * 3))} may be unstable."
    )
    return float(
        draft.choose_setting("learning_rate", value, why, alternative=alternative, source=source)
    )


def round_rate(value: float) -> float:
    """Round to two significant digits: 0.000914 -> 9.1e-4."""
    return float(f"{value:.1e}") if value < 1 else value


def choose_schedule(draft: PlanDraft) -> None:
    why = "Decreases smoothly to zero, so the last steps converge."
    draft.choose_setting(
        "lr_scheduler_type",
        "cosine",
        why,
        alternative="constant_with_warmup would leave the last steps noisy.",
        source="QLoRA and most guides",
    )
    why = "The rate rises during the first 5% of the steps, while AdamW estimates the gradients."
    alternative = "0 would start at the full rate, with estimates from a single batch."
    draft.choose_setting(
        "warmup_ratio",
        0.05,
        why,
        alternative=alternative,
        source="Liu et al. 2020, On the Variance of the Adaptive Learning Rate",
    )


def choose_eval_settings(draft: PlanDraft, config: RunConfig) -> None:
    """Ten evaluations per run, each with a checkpoint, and early stopping after three without
    improvement.
    """
    inputs = draft.inputs
    steps = max(1, inputs.count_steps(config))
    why = f"{EVALS_PER_RUN} evaluations after the first, in about {steps:,} steps."
    short_interval = steps // 50
    alternative = (
        f"{short_interval:,} would spend more time on evaluation."
        if short_interval
        else f"{max(2, steps // 5):,} would show less of the run."
    )
    source = "ten points show where the loss stops improving"
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
        "A checkpoint with each evaluation, so the best one can be kept.",
        "A larger interval would lose more steps after a crash.",
    )
    draft.choose_setting(
        "save_steps",
        interval,
        why,
        alternative=alternative,
        source="each evaluated step has its weights",
    )
    is_stable = inputs.eval_rows >= MIN_STABLE_EVAL_ROWS
    has_enough_steps = steps >= 4 * EVALS_PER_RUN and steps > 3 * interval
    if not is_stable:
        why = f"Off: {inputs.eval_rows} held-out rows are too few for a reliable loss."
    elif not has_enough_steps:
        why = f"Off: about {steps} steps are too few for early stopping."
    else:
        why = (
            "Stops when the held-out loss has not improved in 3 evaluations, because further "
            "training would overfit."
        )
    alternative = (
        "0 would train to the end."
        if is_stable and has_enough_steps
        else "3 would stop at random or not at all."
    )
    draft.choose_setting(
        "early_stopping_patience",
        3 if is_stable and has_enough_steps else 0,
        why,
        alternative=alternative,
        source="Prechelt 1998, Early Stopping, But When?",
    )


def choose_tuning(draft: PlanDraft, config: RunConfig) -> None:
    """Off by default, because trials take extra time. If tuning is locked on, trials vary the
    settings that are not locked.
    """
    if "tuning_budget_fraction" not in METHODS[config.method].settings:
        return
    varied = [name for name in TUNABLE_SETTINGS if name not in draft.locked]
    alternative = "0.3 would spend 30% more steps on short trials that search for better settings."
    why = "Off: the run uses the planned settings."
    draft.choose_setting(
        "tuning_budget_fraction",
        0.0,
        why,
        alternative=alternative,
        source="Li et al. 2020, A System for Massively Parallel Hyperparameter Tuning",
    )
    if not varied and draft.locked.get("tuning_budget_fraction"):
        raise UserError(
            "All settings that tuning could vary are locked. Unlock one of them, or set "
            "tuning_budget_fraction to 0.",
            field="tuning_budget_fraction",
        )
    if "tuning_search_space" in draft.locked or (varied and len(varied) < len(TUNABLE_SETTINGS)):
        alternative = "Without locks, all four settings are varied."
        draft.choose_setting(
            "tuning_search_space",
            ",".join(varied),
            "Locked settings are not varied.",
            alternative=alternative,
            source="your locks",
        )


def summarize_forecast(forecast: Any) -> dict[str, Any]:
    """The values of a forecast that a plan stores."""
    return {
        name: forecast[name]
        for name in ("peak", "precision", "optimizer", "trainable")
        if name in forecast
    }
