"""Auto LLM's plan: the settings of a run with the reason for each. Pure: memory and steps are asked
of the situation.

The technique is LoRA where it fits, QLoRA where memory is short, another one when it is locked or
nothing else is possible.
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
    """The plan around what is locked.

    Raises:
        ConfigError: a locked setting is wrong; `field` names it.
        UserError: nothing fits the device; says what would, or the technique does not fit the
            model.
    """
    if goal not in GOALS:
        raise UserError(
            f"The goal is {goal[:40]!r}; it must be one of {', '.join(GOALS)}.", field="goal"
        )
    draft = PlanDraft(inputs, goal, locked or {})
    # A wrong lock is told first
    RunConfig.from_dict({"max_tokens_per_batch": 131_072, "max_length": 8, **draft.locked})
    length = rules.choose_max_length(draft)
    epochs = rules.choose_epochs(draft)
    rules.choose_max_steps(draft)
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
    draft.choices = [
        choice for choice in draft.choices if choice.setting not in config.inapplicable_settings()
    ]
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
    """Ways to run in the order of `setups`; the last one fits.

    Raises:
        UserError: none fits, or none is possible with this model.
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
    """Rank, alpha and modules, where the technique has them; they are chosen before it, since
    memory depends on them.
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
    """Tokens of a step that holds about so many rows."""
    mean_length = float(inputs.lengths.clip(max=length).mean())
    return max(length, rules.round_up(rows_per_step * mean_length, 64))


def choose_method(draft: PlanDraft, candidates: list[Candidate], selected: Candidate) -> None:
    inputs, method = draft.inputs, selected.config.method
    title, peak = METHODS[method].title, format_bytes(selected.forecast["peak"])
    other_candidate = next(
        (one for one in reversed(candidates) if one.config.method != method), None
    )
    if other_candidate is not None:
        why = (
            f"{title}: {other_candidate.description}, would need {format_memory_use(inputs, other_candidate.forecast['peak'])}; {title} "
            f"needs {peak}."
        )
        alternative = (
            "LoRA is quicker and a little more exact; free memory or take shorter rows for it."
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
            f"On: without it even {without_checkpointing.config.max_tokens_per_batch:,} tokens at once would need "
            f"{format_bytes(without_checkpointing.forecast['peak'])}."
        )
        alternative = "Off would be about a third quicker."
    else:
        why, alternative = (
            f"Off: {peak} fit without it.",
            "On would save activations' memory and take about a third longer.",
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
    """`17.2 GB of 15.6 GB free`; what is so near to all of it that the forecast may miss is told
    with the reserve.
    """
    margin_message = (
        f" (a plan leaves {rules.MEMORY_MARGIN:.0%} of it alone)".replace("%", " %")
        if needed_bytes <= inputs.free_bytes
        else ""
    )
    return f"{format_bytes(needed_bytes)} of {format_bytes(inputs.free_bytes)} free{margin_message}"


def choose_precision_and_optimizer(
    draft: PlanDraft, candidates: list[Candidate], selected: Candidate
) -> None:
    """Precision and optimizer: as suits the device, or with fewer bits where full fine-tuning would
    not fit.
    """
    inputs, config = draft.inputs, selected.config
    wider_weights = next(
        (one for one in reversed(candidates) if one.config.precision != config.precision), None
    )
    if wider_weights is not None:
        why = (
            f"bf16 weights: with fp32 ones {wider_weights.description}, would need "
            f"{format_memory_use(inputs, wider_weights.forecast['peak'])}."
        )
        alternative = (
            "mixed would keep small steps, which bf16 weights round away; free memory for it."
        )
    else:
        why = f"Computes in {selected.forecast['precision']}, which suits {inputs.device} best."
        alternative = "fp32 everywhere would be slower where bf16 is at hand."
    source = "Kalamkar et al. 2019, A Study of BFLOAT16 for Deep Learning Training"
    draft.choose_setting("precision", config.precision, why, alternative=alternative, source=source)
    why = f"{OPTIMIZER_DESCRIPTIONS[selected.forecast['optimizer']]}."
    wider_states = next(
        (one for one in reversed(candidates) if one.config.optim != config.optim), None
    )
    if wider_states is not None:
        why = (
            f"AdamW with states of 8 bits: with 32 bits {wider_states.description}, would need "
            f"{format_memory_use(inputs, wider_states.forecast['peak'])}."
        )
    is_8bit = "8bit" in selected.forecast["optimizer"]
    alternative = (
        "States of "
        f"{'32 bits would take four times' if is_8bit else '8 bits would take a quarter of'} the "
        "memory."
    )
    draft.choose_setting(
        "optim",
        config.optim,
        why,
        alternative=alternative,
        source="Dettmers et al. 2022, 8-bit Optimizers",
    )


OPTIMIZER_DESCRIPTIONS = {
    "adamw_torch": "AdamW, 8 bytes a trained parameter: with an adapter that is little",
    "adamw_8bit": "AdamW with states of 8 bits",
    "paged_adamw_8bit": "AdamW with states of 8 bits, which may move to the host for a moment "
    "when the card is full",
}


def describe_other_method(draft: PlanDraft, selected: Candidate, method: str) -> str:
    """What the nearest other technique would need."""
    title, inapplicable = (
        METHODS[method].title,
        RunConfig.from_dict({"method": method}).inapplicable_settings(),
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
        return f"{title} is not possible here: {error.message}"
    if method == "lora":
        return (
            f"LoRA, which most adapters are made with, would need {format_bytes(forecast['peak'])}."
        )
    return (
        f"QLoRA would need {format_bytes(forecast['peak'])}; it is slower and rounds the base to 4 "
        "bits."
    )


def choose_batch(draft: PlanDraft, selected: Candidate) -> None:
    batch_tokens, accumulation = (
        selected.config.max_tokens_per_batch,
        selected.config.gradient_accumulation_steps,
    )
    mean_length = float(draft.inputs.lengths.clip(max=selected.config.max_length).mean())
    rows_description = (
        f"about {max(1, round(batch_tokens * accumulation / mean_length))} rows a step"
    )
    peak = format_bytes(selected.forecast["peak"])
    why = (
        f"The whole step at once, {rows_description}: {peak} at its fullest moment."
        if accumulation == 1
        else f"So much fits at once: {peak}."
    )
    alternative = (
        "Larger steps make fewer of them; LoRA learns worse from large batches."
        if accumulation == 1
        else "More would not fit."
    )
    draft.choose_setting(
        "max_tokens_per_batch", batch_tokens, why, alternative=alternative, source=rules.LORA_GUIDE
    )
    why = (
        f"{accumulation} x {batch_tokens:,} tokens make {rows_description}."
        if accumulation > 1
        else "Nothing to add up: a step fits at once."
    )
    alternative = (
        "1 would make steps of fewer rows, whose gradients say less."
        if accumulation > 1
        else "2 would make half as many steps."
    )
    draft.choose_setting(
        "gradient_accumulation_steps",
        accumulation,
        why,
        alternative=alternative,
        source=rules.LORA_GUIDE,
    )


def raise_nothing_fits(draft: PlanDraft, candidates: list[Candidate]) -> NoReturn:
    """Raises UserError: nothing fits; names the nearest that would."""
    smallest = min(candidates, key=lambda candidate: float(candidate.forecast["peak"]))
    message = (
        f"Nothing fits: the least, {smallest.description}, needs {format_bytes(smallest.forecast['peak'])} of "
        f"{format_bytes(draft.inputs.free_bytes)} free."
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
                f"{message} With rows cut at {length} tokens ({truncated_percent:.0f} % are longer) it would fit.",
                field="max_length",
                code=NOTHING_FITS,
            )
    raise UserError(
        f"{message} Take a smaller model, or free memory on {draft.inputs.device}.",
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
    """What people look for first, first."""
    return sorted(
        choices,
        key=lambda one: (
            CHOICE_ORDER.index(one.setting) if one.setting in CHOICE_ORDER else len(CHOICE_ORDER)
        ),
    )


def build_facts(inputs: PlanInputs) -> dict[str, Any]:
    names = ("model", "rows", "eval_rows", "trained_tokens", "device", "total_bytes", "free_bytes")
    return {name: getattr(inputs, name) for name in names}
