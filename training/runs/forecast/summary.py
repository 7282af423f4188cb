"""The forecast of a run: rows, tokens, steps, batch size, trainable parameters, memory, device,
file sizes and warnings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from training.catalog.metadata import list_linear_layers
from training.catalog.models import BaseModel
from training.datasets.models import DatasetVersion
from training.engine.config import EXCLUDED_ROW_SETTINGS, RunConfig
from training.engine.file_names import MAX_RECENT_CHECKPOINTS
from training.engine.methods import METHODS
from training.engine.row_numbers import format_row_numbers, parse_row_numbers
from training.engine.settings import parse_layer_pattern
from training.errors import UserError
from training.formatting import format_percent
from training.runs.forecast.batch_shapes import count_steps
from training.runs.forecast.memory import get_cached_forecast
from training.runs.forecast.target_device import TargetDevice
from training.runs.forecast.token_lengths import TokenLengths, get_truncation_stats

TRUNCATION_WARNING_SHARE = 0.01
BYTES_PER_WEIGHT = 4  # adapters are saved in fp32
CHECKPOINT_BYTES_PER_WEIGHT = 12  # with AdamW's two moments
MAX_LISTED_ROWS = 20  # numbers of rows in a message


def forecast_run(
    config: RunConfig,
    model: BaseModel,
    version: DatasetVersion,
    lengths: TokenLengths | None,
    target: TargetDevice,
) -> dict[str, Any]:
    """The numbers of the launch page's summary. Those that need token lengths are absent until the
    lengths are measured.
    """
    memory = get_cached_forecast(config, model, lengths, target)
    trainable = count_trainable_parameters(config, model, memory)
    summary: dict[str, Any] = {
        "rows": version.train_rows,
        "eval_rows": min(version.eval_rows, config.eval_rows),
        "batch": format_batch(config),
        "length": config.max_length,
        "trainable": trainable,
        "parameters": model.metadata.get("parameters"),
        "device": target.description,
        "adapter_bytes": BYTES_PER_WEIGHT * trainable if trainable else None,
        "checkpoint_bytes": CHECKPOINT_BYTES_PER_WEIGHT * trainable if trainable else None,
        "memory": memory and memory | describe_fit(memory, target),
        "warnings": collect_warnings(config, model, lengths),
    }
    if lengths is not None:
        truncation = get_truncation_stats(lengths, config.max_length)
        steps, tokens, exact = count_steps(lengths, config)
        summary |= {
            "lengths": truncation,
            "steps": steps,
            "exact": exact,
            "tokens": tokens,
            "evals": 1 + -(-steps // config.eval_steps),
        }
    return summary


def forecast_disk_bytes(config: RunConfig, model: BaseModel, memory: dict[str, Any] | None) -> int:
    """About what a run writes: see `count_disk_bytes`. Without a count of the trainable parameters,
    those of LoRA with its largest rank stand for them, or 0.5% of the model's.
    """
    trainable = count_trainable_parameters(config, model, memory)
    if trainable is None and "rank" in METHODS[config.method].settings:
        ranks = parse_layer_pattern(config.rank_pattern).values()
        trainable = count_adapted_parameters(model, config, max(config.rank, *ranks, 1))
    if trainable is None:
        trainable = int(model.metadata.get("parameters") or 0) // 200
    return count_disk_bytes(trainable)


def count_disk_bytes(trainable: int) -> int:
    """What a run with so many trainable parameters writes: the checkpoints that are kept while
    another one is written, the adapter, and the copy of it in the registry.
    """
    checkpoints = MAX_RECENT_CHECKPOINTS + 2  # with the best one
    return trainable * (checkpoints * CHECKPOINT_BYTES_PER_WEIGHT + 2 * BYTES_PER_WEIGHT)


def check_data_fits_model(
    lengths: TokenLengths | None,
    *,
    skip_invalid_rows: bool,
    split: str = "training",
) -> None:
    """Raises UserError: the model's chat template rejects a row of the split, or with
    `skip_invalid_rows` all of them.
    """
    if lengths is None or not lengths.invalid_numbers:
        return
    is_partly_valid = lengths.invalid_rows < lengths.measured_rows
    if skip_invalid_rows and is_partly_valid:
        return
    remedy = (
        f" To leave such rows out ({format_first_numbers(lengths.invalid_numbers)}), turn on "
        "skip_invalid_rows."
        if is_partly_valid
        else ""
    )
    raise UserError(
        f"This model cannot be trained on this data: {lengths.invalid_rows:,} of "
        f"{lengths.measured_rows:,} {split} rows are invalid for it. The first is "
        f"{lengths.fault}{remedy}",
        field="data",
        code="rows_unfit" if is_partly_valid else "data_unfit",
    )


def check_excluded_rows(config: RunConfig, version: DatasetVersion) -> None:
    """Raises UserError: `excluded_rows` or `excluded_eval_rows` names rows that the data does not
    have, or leaves none to train on.
    """
    row_counts = (version.train_rows, version.eval_rows)
    for field, rows in zip(EXCLUDED_ROW_SETTINGS, row_counts, strict=True):
        ranges = parse_row_numbers(getattr(config, field))
        last = ranges[-1].stop - 1 if ranges else 0
        if last > rows:
            raise UserError(
                f"{field} names row {last:,}, but {version} has {rows:,} such rows. The list is "
                "for another dataset or version.",
                field=field,
            )
        if field == "excluded_rows" and rows and sum(map(len, ranges)) >= rows:
            raise UserError(f"{field} leaves no row to train on.", field=field)


def format_first_numbers(numbers: Sequence[int]) -> str:
    """The first MAX_LISTED_ROWS row numbers."""
    more = ", ..." if len(numbers) > MAX_LISTED_ROWS else ""
    return f"{format_row_numbers(numbers[:MAX_LISTED_ROWS])}{more}"


def check_trained_tokens(lengths: TokenLengths | None, config: RunConfig) -> None:
    """Raises UserError: max_length leaves no row with a trained token. Of a large dataset only some
    rows are measured, so there it is a warning.
    """
    if lengths is None or lengths.measured_rows < lengths.rows:
        return
    if not lengths.truncate_lengths(config.max_length):
        raise UserError(
            f"None of the {lengths.rows:,} rows has a trained token within {config.max_length:,} "
            "tokens. Increase max_length.",
            field="max_length",
            code="no_trained_tokens",
        )


def collect_warnings(
    config: RunConfig, model: BaseModel, lengths: TokenLengths | None
) -> list[str]:
    """Warnings about these settings with this model and, if its token lengths are known, this
    data.
    """
    length_based = (
        get_length_warnings(get_truncation_stats(lengths, config.max_length), config)
        if lengths is not None
        else []
    )
    return config.list_warnings() + get_context_warnings(config, model) + length_based


def format_batch(config: RunConfig) -> str:
    """`2 x 4 = 8 rows per step`, or tokens."""
    count, unit = (
        (config.per_device_train_batch_size, "rows")
        if config.batch_unit == "rows"
        else (config.max_tokens_per_batch, "tokens")
    )
    if config.gradient_accumulation_steps == 1:
        return f"{count:,} {unit} per step"
    passes = config.gradient_accumulation_steps
    return f"{count:,} x {passes:,} = {count * passes:,} {unit} per step"


def describe_fit(memory: dict[str, Any], target: TargetDevice) -> dict[str, Any]:
    """Whether the run fits into free memory, and the percentage of the device for each kind of
    memory, for the bar.
    """
    required, total, free = memory["peak"], target.total, target.free
    if required <= free:
        verdict = "fits"
    else:
        verdict = "does not fit now" if required <= total else "does not fit this device"
    bar = [
        (name, round(100 * value / max(total, required), 2), value)
        for name, value in memory["kinds"].items()
        if value
    ]
    return {"verdict": verdict, "fits": required <= free, "free": free, "total": total, "bar": bar}


def count_trainable_parameters(
    config: RunConfig, model: BaseModel, memory: dict[str, Any] | None
) -> int | None:
    """From the memory forecast, or without one for LoRA and full fine-tuning."""
    if memory:
        return int(memory["trainable"])
    if METHODS[config.method].is_full_finetuning:
        return model.metadata.get("parameters")
    return count_lora_parameters(model, config)


def count_lora_parameters(model: BaseModel, config: RunConfig) -> int | None:
    """Rank x (in + out), summed over the linear layers that LoRA adapts (Hu et al. 2021, 4.1). None
    for other methods, whose memory estimator counts the parameters.
    """
    if "rank" not in METHODS[config.method].settings or config.use_dora or config.rank_pattern:
        return None
    return count_adapted_parameters(model, config, config.rank)


def count_adapted_parameters(model: BaseModel, config: RunConfig, rank: int) -> int:
    target_modules = [name.strip() for name in config.target_modules.split(",") if name.strip()]
    layers = list_linear_layers(model.folder)
    shapes = [
        shape
        for name, shape in layers
        if target_modules == ["all-linear"]
        or any(f".{name}".endswith(f".{suffix}") for suffix in target_modules)
    ]
    return sum(rank * (rows + columns) for rows, columns in shapes)


def get_context_warnings(config: RunConfig, model: BaseModel) -> list[str]:
    context_length = model.metadata.get("context_length")
    virtual_tokens = config.prepended_tokens
    if context_length and config.max_length + virtual_tokens > context_length:
        virtual_text = f" plus {virtual_tokens:,} virtual tokens" if virtual_tokens else ""
        return [
            f"max_length is {config.max_length:,}{virtual_text}, but the context length of "
            f"{model.name} is {context_length:,} tokens."
        ]
    return []


def get_length_warnings(truncation: dict[str, Any], config: RunConfig) -> list[str]:
    warnings, measured_rows = [], truncation["measured_rows"]
    if truncation["special_token_rows"]:
        warnings.append(
            f"{truncation['special_token_rows']:,} of {measured_rows:,} rows of plain text hold "
            "special tokens of this model, as text that was rendered with a chat template does. "
            "All of it is trained, also the prompts. To train only the answers, edit the column "
            "mapping of the data."
        )
    invalid_rows = truncation["invalid"]
    if invalid_rows and config.skip_invalid_rows:
        warnings.append(
            f"{invalid_rows:,} of {measured_rows:,} rows are left out, because the model's chat "
            f"template rejects them ({format_first_numbers(truncation['invalid_numbers'])}). The "
            f"first is {truncation['fault']}"
        )
    if truncation["empty"] > invalid_rows:
        warnings.append(
            f"{truncation['empty'] - invalid_rows:,} of {measured_rows:,} rows have no trained "
            f"token within {config.max_length:,} tokens and are skipped. Increase max_length."
        )
    if truncation["truncated_share"] > TRUNCATION_WARNING_SHARE:
        warnings.append(
            f"{truncation['truncated']:,} of {measured_rows:,} rows "
            f"({format_percent(truncation['truncated_share'])}) are truncated at "
            f"{config.max_length:,} tokens. The longest has {truncation['longest']:,}. "
            "Increase max_length."
        )
    return warnings
