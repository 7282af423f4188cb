"""Auto LLM's plan: the settings of a run, each with a reason. It has no side effects; PlanInputs
provides the memory forecast and the step count.

The method is LoRA if it fits, QLoRA if memory is short, and another one only if it is locked or
nothing else works with the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from training.auto import rules
from training.auto.candidates import Candidate, iter_candidates
from training.auto.plan_types import GOALS, Choice, Plan, PlanDraft, PlanInputs
from training.engine.config import RunConfig
from training.engine.methods import METHODS
from training.errors import UserError
from training.formatting import format_bytes

NOTHING_FITS = "nothing_fits"


def make_plan(
    inputs: PlanInputs, *, goal: str = "task", locked: Mapping[str, Any] | None = None
) -> Plan:
    """Choose all settings that are not locked.

    Raises:
        ConfigError: a locked setting is invalid; `field` names it.
        UserError: nothing fits the device (the message names what would), or the method does not
            work with the model.
    """
    if goal not in GOALS:
        raise UserError(
            f"Unknown goal {goal[:40]!r}. Use one of: {', '.join(GOALS)}.", field="goal"
        )
    draft = PlanDraft(inputs, goal, locked or {})
    # Report an invalid lock before anything else
    RunConfig.from_dict({"max_tokens_per_batch": 131_072, "max_length": 8, **draft.locked})
    length = rules.choose_max_length(draft)
    epochs = rules.choose_epochs(draft)
    rules.choose_max_steps(draft)
    rules.choose_rows(draft)
    lora_settings = choose_lora_settings(draft)
    rows_per_step = rules.compute_rows_per_step(draft, epochs)
    step_tokens = compute_step_tokens(inputs, length, rows_per_step)
    common_settings = {
        "max_length": length,
        "epochs": epochs,
        **{name: v for name, v in draft.locked.items() if name not in lora_settings},
    }
    candidates = try_candidates(draft, common_settings | lora_settings, step_tokens)
    selected = candidates[-1]
    choose_method(draft, candidates, selected)
    choose_batch(draft, selected)
    learning_rate = rules.choose_learning_rate(draft, selected.config)
    rules.choose_schedule(draft)
    config = RunConfig.from_dict({**selected.config.to_dict(), "learning_rate": learning_rate})
    rules.choose_eval_settings(draft, config)
    rules.choose_tuning(draft, config)
    inapplicable = config.get_inapplicable_settings()
    draft.choices = [choice for choice in draft.choices if choice.setting not in inapplicable]
    draft.check_unused_locks()
    plan = Plan(
        goal,
        sort_choices(draft.choices),
        {**build_facts(inputs), **rules.summarize_forecast(selected.forecast)},
    )
    RunConfig.from_dict(plan.settings)
    return plan


def try_candidates(
    draft: PlanDraft, common_settings: dict[str, Any], step_tokens: int
) -> list[Candidate]:
    """Forecast candidates in order until one fits. Returns those tried; the last one fits.

    Raises:
        UserError: none fits, or no method works with this model.
    """
    candidates: list[Candidate] = []
    problems: list[UserError] = []
    for candidate in iter_candidates(draft, common_settings, step_tokens, problems):
        candidates.append(candidate)
        if candidate.fits_device:
            return candidates
    if not candidates:
        raise problems[0]
    raise_nothing_fits(draft, candidates)


def choose_lora_settings(draft: PlanDraft) -> dict[str, Any]:
    """Choose rank, alpha and target modules if the method has them. They come before the method
    because memory depends on them.
    """
    method = draft.locked.get("method", "lora")
    if "rank" not in METHODS[method].settings:
        return {}
    rank = rules.choose_rank(draft)
    return {
        "rank": rank,
        "alpha": rules.choose_alpha(draft, rank),
        "target_modules": rules.choose_target_modules(draft),
    }


def compute_step_tokens(inputs: PlanInputs, length: int, rows_per_step: int) -> int:
    """Tokens of a step with about this many rows."""
    mean_length = float(inputs.lengths.clip(max=length).mean())
    return max(length, rules.round_up(rows_per_step * mean_length, 64))


def choose_method(draft: PlanDraft, candidates: list[Candidate], selected: Candidate) -> None:
    inputs, method = draft.inputs, selected.config.method
    title, peak = METHODS[method].title, format_bytes(selected.forecast["peak"])
    other_candidate = next(
        (one for one in reversed(candidates) if one.config.method != method), None
    )
    if other_candidate is not None:
        needed = format_memory_use(inputs, other_candidate.forecast["peak"])
        why = f"{title} needs {peak}. {other_candidate.description} would need {needed}."
        alternative = (
            "LoRA is faster and slightly more accurate. To use it, free memory or shorten the rows."
        )
    else:
        why = f"{title} fits: {peak} of {format_bytes(inputs.free_bytes)} free on {inputs.device}."
        alternative = describe_other_method(
            draft, selected, "qlora" if method == "lora" else "lora"
        )
    draft.choose_setting(
        "method", method, why, alternative=alternative, source=METHODS[method].paper
    )
    without_checkpointing = next(
        (
            one
            for one in reversed(candidates)
            if one.config.method == method and not one.config.gradient_checkpointing
        ),
        None,
    )
    if selected.config.gradient_checkpointing and without_checkpointing is not None:
        why = (
            f"On: without it, {without_checkpointing.config.max_tokens_per_batch:,} tokens per "
            f"batch would need {format_bytes(without_checkpointing.forecast['peak'])}."
        )
        alternative = "Off would be about a third faster."
    else:
        why, alternative = (
            f"Off: the run fits without it ({peak}).",
            "On would need less memory for activations and take about a third longer.",
        )
    source = "Chen et al. 2016, Training Deep Nets with Sublinear Memory Cost"
    draft.choose_setting(
        "gradient_checkpointing",
        selected.config.gradient_checkpointing,
        why,
        alternative=alternative,
        source=source,
    )
    choose_precision_and_optimizer(draft, candidates, selected)


def format_memory_use(inputs: PlanInputs, needed_bytes: float) -> str:
    """`17.2 GB of 15.6 GB free`. If it exceeds only the safety margin, the margin is mentioned."""
    margin_message = (
        f" (plans leave {rules.MEMORY_MARGIN:.0%} free as a margin)"
        if needed_bytes <= inputs.free_bytes
        else ""
    )
    return f"{format_bytes(needed_bytes)} of {format_bytes(inputs.free_bytes)} free{margin_message}"


def choose_precision_and_optimizer(
    draft: PlanDraft, candidates: list[Candidate], selected: Candidate
) -> None:
    """Use the device's best precision and AdamW, or fewer bits if full fine-tuning would not
    fit.
    """
    inputs, config = draft.inputs, selected.config
    wider_weights = next(
        (one for one in reversed(candidates) if one.config.precision != config.precision), None
    )
    if wider_weights is not None:
        why = (
            f"bf16 weights: with fp32 weights, {wider_weights.description} would need "
            f"{format_memory_use(inputs, wider_weights.forecast['peak'])}."
        )
        alternative = (
            "mixed keeps small updates that bf16 weights round away. To use it, free memory."
        )
    else:
        why = f"Computes in {selected.forecast['precision']}, the best choice on {inputs.device}."
        alternative = "fp32 would be slower on devices with bf16."
    source = "Kalamkar et al. 2019, A Study of BFLOAT16 for Deep Learning Training"
    draft.choose_setting("precision", config.precision, why, alternative=alternative, source=source)
    why = f"{OPTIMIZER_DESCRIPTIONS[selected.forecast['optimizer']]}."
    wider_states = next(
        (one for one in reversed(candidates) if one.config.optim != config.optim), None
    )
    if wider_states is not None:
        why = (
            f"8-bit AdamW: with 32-bit states, {wider_states.description} would need "
            f"{format_memory_use(inputs, wider_states.forecast['peak'])}."
        )
    is_8bit = "8bit" in selected.forecast["optimizer"]
    alternative = (
        "32-bit states would need four times the memory."
        if is_8bit
        else "8-bit states would need a quarter of the memory."
    )
    draft.choose_setting(
        "optim",
        config.optim,
        why,
        alternative=alternative,
        source="Dettmers et al. 2022, 8-bit Optimizers",
    )


OPTIMIZER_DESCRIPTIONS = {
    "adamw_torch": "AdamW needs 8 bytes per trained parameter, which is little for an adapter",
    "adamw_8bit": "AdamW with 8-bit states",
    "paged_adamw_8bit": "AdamW with 8-bit states that can move to host memory while the GPU is "
    "full",
}


def describe_other_method(draft: PlanDraft, selected: Candidate, method: str) -> str:
    """The memory that the closest other method would need."""
    title, inapplicable = (
        METHODS[method].title,
        RunConfig.from_dict({"method": method}).get_inapplicable_settings(),
    )
    settings = {
        setting: value
        for setting, value in selected.config.to_dict().items()
        if setting not in inapplicable
    }
    try:
        forecast = draft.inputs.forecast_memory(RunConfig.from_dict({**settings, "method": method}))
    except UserError as error:
        if error.field not in ("model", "method"):
            raise
        return f"{title} does not work here: {error.message}"
    if method == "lora":
        return f"LoRA, the most common method, would need {format_bytes(forecast['peak'])}."
    return (
        f"QLoRA would need {format_bytes(forecast['peak'])}. It is slower and quantizes the base "
        "model to 4 bits."
    )


def choose_batch(draft: PlanDraft, selected: Candidate) -> None:
    batch_tokens, accumulation = (
        selected.config.max_tokens_per_batch,
        selected.config.gradient_accumulation_steps,
    )
    mean_length = float(draft.inputs.lengths.clip(max=selected.config.max_length).mean())
    rows_description = (
        f"about {max(1, round(batch_tokens * accumulation / mean_length))} rows per step"
    )
    peak = format_bytes(selected.forecast["peak"])
    if accumulation == 1:
        why = f"One batch per step, {rows_description}: peak memory {peak}."
        alternative = "Larger batches give fewer steps, and LoRA learns worse from large batches."
    elif "gradient_accumulation_steps" in draft.locked:
        why = f"The step is divided into {accumulation} batches: peak memory {peak}."
        alternative = "Larger batches give larger steps."
    else:
        why = f"The largest batch that fits: peak memory {peak}."
        alternative = "Larger batches would not fit."
    draft.choose_setting(
        "max_tokens_per_batch", batch_tokens, why, alternative=alternative, source=rules.LORA_GUIDE
    )
    why = (
        f"{accumulation} x {batch_tokens:,} tokens are {rows_description}."
        if accumulation > 1
        else "No accumulation needed: a complete step fits in one batch."
    )
    alternative = (
        "1 would give steps with fewer rows and noisier gradients."
        if accumulation > 1
        else "2 would give half as many steps."
    )
    draft.choose_setting(
        "gradient_accumulation_steps",
        accumulation,
        why,
        alternative=alternative,
        source=rules.LORA_GUIDE,
    )


def raise_nothing_fits(draft: PlanDraft, candidates: list[Candidate]) -> NoReturn:
    """Report that nothing fits, and what would.

    Raises:
        UserError: always. `field` is `max_length` if shorter rows would fit, otherwise `model`.
    """
    smallest = min(candidates, key=lambda candidate: float(candidate.forecast["peak"]))
    message = (
        f"Not enough memory. The smallest option, {smallest.description}, needs "
        f"{format_bytes(smallest.forecast['peak'])}; {format_bytes(draft.inputs.free_bytes)} are "
        "free."
    )
    length = smallest.config.max_length
    while length > 64:
        length = rules.round_up(length / 2, 32)
        shorter_settings = {
            **smallest.config.to_dict(),
            "max_length": length,
            "max_tokens_per_batch": length,
        }
        if (
            draft.inputs.forecast_memory(RunConfig.from_dict(shorter_settings))["peak"]
            <= smallest.available_bytes
        ):
            truncated_percent = 100 * draft.inputs.truncated_share(length)
            raise UserError(
                f"{message} With max_length {length} it would fit; {truncated_percent:.0f}% of the "
                "rows are longer.",
                field="max_length",
                code=NOTHING_FITS,
            )
    raise UserError(
        f"{message} Use a smaller model, or free memory on {draft.inputs.device}.",
        field="model",
        code=NOTHING_FITS,
    )


CHOICE_ORDER = (
    "method",
    "rank",
    "alpha",
    "target_modules",
    "learning_rate",
    "epochs",
    "max_steps",
    "max_length",
    "max_tokens_per_batch",
    "gradient_accumulation_steps",
)


def sort_choices(choices: list[Choice]) -> list[Choice]:
    """Sort the settings that people look for first to the top."""
    return sorted(
        choices,
        key=lambda choice: (
            CHOICE_ORDER.index(choice.setting)
            if choice.setting in CHOICE_ORDER
            else len(CHOICE_ORDER)
        ),
    )


def build_facts(inputs: PlanInputs) -> dict[str, Any]:
    names = ("model", "rows", "eval_rows", "trained_tokens", "device", "total_bytes", "free_bytes")
    return {name: getattr(inputs, name) for name in names}
