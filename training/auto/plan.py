"""Auto LLM's plan: the settings of a run with the reason for each. Pure: memory and steps are asked
of the situation.

The technique is LoRA where it fits, QLoRA where memory is short, another one when it is locked or
nothing else is possible.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from training.auto import rules
from training.auto.setups import Setup, setups
from training.auto.situation import GOALS, Choice, Draft, Plan, Situation
from training.engine.config import RunConfig
from training.engine.methods import METHODS
from training.errors import UserError
from training.formatting import format_bytes

NOTHING_FITS = "nothing_fits"


def make_plan(
    situation: Situation, *, goal: str = "task", locked: Mapping[str, Any] | None = None
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
    draft = Draft(situation, goal, locked or {})
    # A wrong lock is told first
    RunConfig.from_dict({"max_tokens_per_batch": 131_072, "max_length": 8, **draft.locked})
    length = rules.max_length(draft)
    epochs = rules.epochs(draft)
    rules.max_steps(draft)
    beside = shape_of(draft)
    rows = rules.rows_a_step(draft, epochs)
    tokens = wanted_tokens(situation, length, rows)
    common = {
        "max_length": length,
        "epochs": epochs,
        **{name: v for name, v in draft.locked.items() if name not in beside},
    }
    tried = tried_until_one_fits(draft, common | beside, tokens)
    taken = tried[-1]
    choose_technique(draft, tried, taken)
    choose_batch(draft, taken)
    rate = rules.learning_rate(draft, taken.config)
    rules.schedule(draft)
    final = RunConfig.from_dict({**taken.config.to_dict(), "learning_rate": rate})
    rules.measuring(draft, final)
    rules.trials(draft, final)
    draft.choices = [choice for choice in draft.choices if choice.setting not in final.inapplicable_settings()]
    draft.refuse_unused()
    plan = Plan(goal, ordered(draft.choices), {**facts_of(situation), **rules.numbers(taken.need)})
    RunConfig.from_dict(plan.settings)
    return plan


def tried_until_one_fits(draft: Draft, common: dict[str, Any], tokens: int) -> list[Setup]:
    """Ways to run in the order of `setups`; the last one fits.

    Raises:
        UserError: none fits, or none is possible with this model.
    """
    tried: list[Setup] = []
    problems: list[UserError] = []
    for setup in setups(draft, common, tokens, problems):
        tried.append(setup)
        if setup.fits:
            return tried
    if not tried:
        raise problems[0]
    refuse(draft, tried)


def shape_of(draft: Draft) -> dict[str, Any]:
    """Rank, alpha and modules, where the technique has them; they are chosen before it, since
    memory depends on them.
    """
    method = draft.locked.get("method", "lora")
    if "rank" not in METHODS[method].settings:
        return {}
    rank = rules.rank(draft)
    return {
        "rank": rank,
        "alpha": rules.alpha(draft, rank),
        "target_modules": rules.target_modules(draft),
    }


def wanted_tokens(situation: Situation, length: int, rows: int) -> int:
    """Tokens of a step that holds about so many rows."""
    mean = float(situation.lengths.clip(max=length).mean())
    return max(length, rules.up_to(rows * mean, 64))


def choose_technique(draft: Draft, tried: list[Setup], taken: Setup) -> None:
    at, method = draft.situation, taken.config.method
    title, need = METHODS[method].title, format_bytes(taken.need["peak"])
    other = next((one for one in reversed(tried) if one.config.method != method), None)
    if other is not None:
        why = (
            f"{title}: {other.words}, would need {of_free(at, other.need['peak'])}; {title} "
            f"needs {need}."
        )
        instead = (
            "LoRA is quicker and a little more exact; free memory or take shorter rows for it."
        )
    else:
        why = f"{title} fits: {need} of {format_bytes(at.free)} free on {at.device}."
        instead = other_technique(draft, taken, "qlora" if method == "lora" else "lora")
    draft.take("method", method, why, instead=instead, source=METHODS[method].paper)
    plain = next(
        (
            one
            for one in reversed(tried)
            if one.config.method == method and not one.config.gradient_checkpointing
        ),
        None,
    )
    if taken.config.gradient_checkpointing and plain is not None:
        why = (
            f"On: without it even {plain.config.max_tokens_per_batch:,} tokens at once would need "
            f"{format_bytes(plain.need['peak'])}."
        )
        instead = "Off would be about a third quicker."
    else:
        why, instead = (
            f"Off: {need} fit without it.",
            "On would save activations' memory and take about a third longer.",
        )
    source = "Chen et al. 2016, Training Deep Nets with Sublinear Memory Cost"
    draft.take(
        "gradient_checkpointing",
        taken.config.gradient_checkpointing,
        why,
        instead=instead,
        source=source,
    )
    choose_bits(draft, tried, taken)


def of_free(at: Situation, need: float) -> str:
    """`17.2 GB of 15.6 GB free`; what is so near to all of it that the forecast may miss is told
    with the reserve.
    """
    spare = (
        f" (a plan leaves {rules.SPARE:.0%} of it alone)".replace("%", " %")
        if need <= at.free
        else ""
    )
    return f"{format_bytes(need)} of {format_bytes(at.free)} free{spare}"


def choose_bits(draft: Draft, tried: list[Setup], taken: Setup) -> None:
    """Precision and optimizer: as suits the device, or with fewer bits where full fine-tuning would
    not fit.
    """
    at, config = draft.situation, taken.config
    wider = next((one for one in reversed(tried) if one.config.precision != config.precision), None)
    if wider is not None:
        why = (
            f"bf16 weights: with fp32 ones {wider.words}, would need "
            f"{of_free(at, wider.need['peak'])}."
        )
        instead = "mixed would keep small steps, which bf16 weights round away; free memory for it."
    else:
        why = f"Computes in {taken.need['precision']}, which suits {at.device} best."
        instead = "fp32 everywhere would be slower where bf16 is at hand."
    source = "Kalamkar et al. 2019, A Study of BFLOAT16 for Deep Learning Training"
    draft.take("precision", config.precision, why, instead=instead, source=source)
    why = f"{OPTIMIZERS[taken.need['optimizer']]}."
    whole = next((one for one in reversed(tried) if one.config.optim != config.optim), None)
    if whole is not None:
        why = (
            f"AdamW with states of 8 bits: with 32 bits {whole.words}, would need "
            f"{of_free(at, whole.need['peak'])}."
        )
    short = "8bit" in taken.need["optimizer"]
    instead = (
        "States of "
        f"{'32 bits would take four times' if short else '8 bits would take a quarter of'} the "
        "memory."
    )
    draft.take(
        "optim",
        config.optim,
        why,
        instead=instead,
        source="Dettmers et al. 2022, 8-bit Optimizers",
    )


OPTIMIZERS = {
    "adamw_torch": "AdamW, 8 bytes a trained parameter: with an adapter that is little",
    "adamw_8bit": "AdamW with states of 8 bits",
    "paged_adamw_8bit": "AdamW with states of 8 bits, which may move to the host for a moment "
    "when the card is full",
}


def other_technique(draft: Draft, taken: Setup, name: str) -> str:
    """What the nearest other technique would need."""
    title, own = METHODS[name].title, RunConfig.from_dict({"method": name}).inapplicable_settings()
    settings = {
        setting: value for setting, value in taken.config.to_dict().items() if setting not in own
    }
    try:
        need = draft.situation.need(RunConfig.from_dict({**settings, "method": name}))
    except UserError as error:
        if error.field not in ("model", "method"):
            raise
        return f"{title} is not possible here: {error.message}"
    if name == "lora":
        return f"LoRA, which most adapters are made with, would need {format_bytes(need['peak'])}."
    return (
        f"QLoRA would need {format_bytes(need['peak'])}; it is slower and rounds the base to 4 "
        "bits."
    )


def choose_batch(draft: Draft, taken: Setup) -> None:
    at_once, times = taken.config.max_tokens_per_batch, taken.config.gradient_accumulation_steps
    mean = float(draft.situation.lengths.clip(max=taken.config.max_length).mean())
    about = f"about {max(1, round(at_once * times / mean))} rows a step"
    need = format_bytes(taken.need["peak"])
    why = (
        f"The whole step at once, {about}: {need} at its fullest moment."
        if times == 1
        else f"So much fits at once: {need}."
    )
    instead = (
        "Larger steps make fewer of them; LoRA learns worse from large batches."
        if times == 1
        else "More would not fit."
    )
    draft.take("max_tokens_per_batch", at_once, why, instead=instead, source=rules.MANUAL)
    why = (
        f"{times} x {at_once:,} tokens make {about}."
        if times > 1
        else "Nothing to add up: a step fits at once."
    )
    instead = (
        "1 would make steps of fewer rows, whose gradients say less."
        if times > 1
        else "2 would make half as many steps."
    )
    draft.take("gradient_accumulation_steps", times, why, instead=instead, source=rules.MANUAL)


def refuse(draft: Draft, tried: list[Setup]) -> NoReturn:
    """Raises UserError: nothing fits; names the nearest that would."""
    least = min(tried, key=lambda setup: float(setup.need["peak"]))
    words = (
        f"Nothing fits: the least, {least.words}, needs {format_bytes(least.need['peak'])} of "
        f"{format_bytes(draft.situation.free)} free."
    )
    length = least.config.max_length
    while length > 64:
        length = rules.up_to(length / 2, 32)
        fixed = {**least.config.to_dict(), "max_length": length, "max_tokens_per_batch": length}
        if draft.situation.need(RunConfig.from_dict(fixed))["peak"] <= least.room:
            cut = 100 * draft.situation.cut_share(length)
            raise UserError(
                f"{words} With rows cut at {length} tokens ({cut:.0f} % are longer) it would fit.",
                field="max_length",
                code=NOTHING_FITS,
            )
    raise UserError(
        f"{words} Take a smaller model, or free memory on {draft.situation.device}.",
        field="model",
        code=NOTHING_FITS,
    )


ORDER = (
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


def ordered(choices: list[Choice]) -> list[Choice]:
    """What people look for first, first."""
    return sorted(
        choices, key=lambda one: ORDER.index(one.setting) if one.setting in ORDER else len(ORDER)
    )


def facts_of(situation: Situation) -> dict[str, Any]:
    names = ("model", "rows", "heldout_rows", "trained_tokens", "device", "total", "free")
    return {name: getattr(situation, name) for name in names}
