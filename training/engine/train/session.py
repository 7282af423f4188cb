"""The session of an attempt: encoded data, wrapped model, optimizer, batch plan and current step.

`prepare_session` builds it and yields progress events; the training loop runs on it.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from training.engine.batches import BatchPlan, plan_steps
from training.engine.config import RunConfig
from training.engine.data.conversations import (
    EncodedRow,
    encode_rows,
    ensure_chat_template,
    load_tokenizer,
    read_rows,
)
from training.engine.data.errors import DataError
from training.engine.methods import METHODS
from training.engine.modeling import optimizers, weights
from training.engine.modeling.adapter_init import initialize_adapter
from training.engine.modeling.host_errors import is_host_error
from training.engine.modeling.model import (
    LabeledPositionsHead,
    compute_in_bf16,
    count_parameters,
    get_weights_dtype,
    limit_memory_fraction,
    load_base,
    resolve_device,
    resolve_precision,
    set_deterministic,
    wrap_base_model,
)
from training.engine.row_numbers import format_row_numbers, list_row_numbers
from training.engine.train import checkpoint
from training.engine.train.memory_meter import MemoryMeter
from training.errors import ConfigError

Event = tuple[str, dict[str, Any]]  # Kind and fields; the journal adds number and time
PROGRESS_INTERVAL = 500
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "safetensors", "tokenizers")


@dataclass
class Session:
    """The state of one attempt. Losses are in nats per trained token.

    `prepare_session` creates it in the engine process, the attempt owns it, and the training loop
    and the trials change it. It lives in the main thread until the process ends.
    """

    config: RunConfig
    run_dir: Path
    device: torch.device
    meter: MemoryMeter
    tokenizer: Any
    rows: list[EncodedRow]
    eval_rows: list[EncodedRow]
    raw_eval_rows: list[dict[str, Any]]
    model: Any
    head: LabeledPositionsHead
    optimizer: torch.optim.Optimizer
    initial_adapter: dict[str, torch.Tensor] | None
    plan: BatchPlan
    step: int = 0
    total_tokens: int = 0
    loss: float | None = None
    eval_loss: float | None = None
    last_eval_step: int | None = None
    best_loss: float | None = None
    best_step: int | None = None
    saved_step: int = 0
    failed_saves: int = field(default=0)

    def get_trainer_state(self) -> dict[str, Any]:
        """The fields of this session that a checkpoint stores besides tensors."""
        return {
            "total_tokens": self.total_tokens,
            "loss": self.loss,
            "eval_loss": self.eval_loss,
            "last_eval_step": self.last_eval_step,
            "best_loss": self.best_loss,
            "best_step": self.best_step,
        }

    def get_checkpoint_state(self) -> checkpoint.CheckpointState:
        return checkpoint.CheckpointState(
            self.model, self.optimizer, self.config, self.initial_adapter
        )

    def count_trainable_parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)


def prepare_session(config: RunConfig, run_dir: Path, attempt: int) -> Iterator[Event | Session]:
    """Load the model and encode the data. Yields events, and the session as the last item.

    Raises:
        DataError, ConfigError: the data or a setting cannot be used with this model.
    """
    device = resolve_device()
    limit_memory_fraction(device)
    set_deterministic(config, device)
    meter = MemoryMeter(device)
    yield "phase", {"name": "loading tokenizer"}
    tokenizer = load_tokenizer(Path(config.model))
    template = ensure_chat_template(tokenizer)
    encoded = yield from encode_data(tokenizer, config)
    yield "phase", {"name": "loading model"}
    method = METHODS[config.method]
    precision = resolve_precision(config, device)
    base = load_base(
        Path(config.model),
        get_weights_dtype(precision),
        device,
        quantized=method.has_quantized_base,
    )
    parameters = count_parameters(base)
    model = wrap_for_training(base, config, device)
    session = Session(
        config=config,
        run_dir=run_dir,
        device=device,
        meter=meter,
        tokenizer=tokenizer,
        rows=encoded.rows,
        eval_rows=encoded.eval_rows,
        raw_eval_rows=encoded.raw_eval_rows,
        model=model,
        head=LabeledPositionsHead(model),
        optimizer=optimizers.make_optimizer(model, config, device),
        initial_adapter=weights.copy_initial_state(model, config),
        plan=plan_steps([len(row) for row in encoded.rows], config),
    )
    yield "memory", {"moment": "load", "step": 0, **meter.read_memory()}
    start_fields = describe_start(session) | encoded.row_counts
    yield (
        "start",
        {"attempt": attempt, "chat_template": template, "parameters": parameters, **start_fields},
    )
    if attempt == 1:  # In later attempts the target modules may come from a trial
        method.check_wrapped_model(session.model, config)
    if config.packing:
        session.head.check_packing_isolation(
            session.model, session.rows[0].ids[: config.max_length // 2]
        )
    yield from resume_from_checkpoint(session, attempt)
    yield session


class EncodedData(NamedTuple):
    """`rows` and `eval_rows` have trained tokens. `row_counts` has the numbers of the excluded
    rows, and counts empty and truncated ones.
    """

    rows: list[EncodedRow]
    eval_rows: list[EncodedRow]
    raw_eval_rows: list[dict[str, Any]]
    row_counts: dict[str, int | str]


def encode_data(tokenizer: Any, config: RunConfig) -> Generator[Event, None, EncodedData]:
    """Encode the training and the held-out rows.

    Raises:
        DataError: no row has a trained token.
    """
    train_rows = read_rows(Path(config.train_data))
    raw_eval_rows = read_rows(Path(config.eval_data))[: config.eval_rows]
    encoded = yield from encode_with_progress(
        tokenizer, train_rows, config, "tokenizing", config.excluded_rows
    )
    rows = [row for row in encoded if row is not None]
    encoded_eval = yield from encode_with_progress(
        tokenizer, raw_eval_rows, config, "tokenizing held-out rows", config.excluded_eval_rows
    )
    raw_eval_rows = [
        row
        for row, encoded_row in zip(raw_eval_rows, encoded_eval, strict=True)
        if encoded_row is not None
    ]
    row_counts: dict[str, int | str] = {
        "excluded_row_count": encoded.count(None),
        "excluded_rows": format_excluded_rows(encoded),
        "excluded_eval_rows": format_excluded_rows(encoded_eval),
        "truncated_rows": sum(row.truncated_tokens > 0 for row in rows),
        "empty_rows": sum(not row.trained_tokens for row in rows),
    }
    if row_counts["excluded_row_count"] and not row_counts["excluded_rows"]:
        message = "Too many rows are left out to list their numbers in the run's config."
        yield "log", {"level": "warning", "text": message}
    rows = [row for row in rows if row.trained_tokens]
    if not rows:
        raise DataError(
            f"None of the {len(train_rows)} rows has a trained token within {config.max_length} "
            "tokens. Increase max_length.",
            field="max_length",
        )
    eval_rows = [row for row in encoded_eval if row is not None and row.trained_tokens]
    return EncodedData(rows, eval_rows, raw_eval_rows, row_counts)


def format_excluded_rows(encoded: Sequence[EncodedRow | None]) -> str:
    """The numbers of the rows that were left out, as in the setting `excluded_rows`."""
    return format_row_numbers(number for number, row in enumerate(encoded, start=1) if row is None)


def describe_start(session: Session) -> dict[str, object]:
    """Fields of the `start` event about data, model and machine."""
    config, device = session.config, session.device
    return {
        "step": 0,
        "total_steps": session.plan.total_steps,
        "epochs": session.plan.epochs,
        "rows": len(session.rows),
        "eval_rows": len(session.eval_rows),
        "tokens": sum(len(row) for row in session.rows),
        "trained_tokens": sum(row.trained_tokens for row in session.rows),
        "trainable_parameters": session.count_trainable_parameters(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "precision": resolve_precision(config, device),
        "optimizer": config.resolve_optimizer(device.type),
        "threads": torch.get_num_threads(),
        "versions": {name: importlib.metadata.version(name) for name in LIBRARIES},
    }


def wrap_for_training(base: Any, config: RunConfig, device: torch.device) -> Any:
    """Wrap the base model for the run's method and precision."""
    model = wrap_base_model(base, config)
    if resolve_precision(config, device) == "mixed":
        compute_in_bf16(model, device)
    return model


def resume_from_checkpoint(session: Session, attempt: int) -> Iterator[Event]:
    """Restore the newest valid checkpoint. Without one, load or compute the initial weights."""
    latest = checkpoint.find_latest_valid(session.run_dir)
    if latest is not None:
        trainer_state = checkpoint.load_checkpoint(latest, session.get_checkpoint_state())
        session.step = session.saved_step = trainer_state.pop("step")
        if trainer_state.pop("is_optimizer_reset"):
            message = (
                "The checkpoint was saved with a different optimizer. Its weights are restored; "
                "the optimizer state is reset."
            )
            yield "log", {"level": "warning", "text": message}
        for name, value in trainer_state.items():
            setattr(session, name, value)
    elif session.config.init_from:
        load_initial_weights(session)
    elif session.config.init_lora_weights in ("eva", "loftq"):
        yield "phase", {"name": "initializing adapter"}
        initialize_adapter(session.model, session.config, session.rows)
    if attempt > 1:
        yield "resume", {"attempt": attempt, "step": session.step}


def load_initial_weights(session: Session) -> None:
    """Load the weights of the adapter version that this run continues.

    Raises:
        ConfigError: the names or shapes of the weights do not match the settings.
        OSError, RuntimeError: of the machine (host_errors.py).
    """
    try:
        weights.check_parameter_names(session.model, Path(session.config.init_from))
        weights.read_weights(session.model, Path(session.config.init_from), {})
    except (RuntimeError, KeyError, OSError) as error:
        if is_host_error(error):
            raise
        reason = str(error).splitlines()[0][:300]
        raise ConfigError(
            f"The version's weights do not match these settings: {reason}", field="init_from"
        ) from error


def encode_with_progress(
    tokenizer: Any,
    rows: Sequence[dict[str, Any]],
    config: RunConfig,
    phase_name: str,
    excluded_rows: str,
) -> Generator[Event, None, list[EncodedRow | None]]:
    encoded_rows: list[EncodedRow | None] = []
    encoded = encode_rows(
        tokenizer,
        rows,
        max_length=config.max_length,
        train_on_prompt=config.train_on_prompt,
        skip_invalid_rows=config.skip_invalid_rows,
        excluded=set(list_row_numbers(excluded_rows, len(rows))),
    )
    for index, row in enumerate(encoded):
        if index % PROGRESS_INTERVAL == 0:
            yield "phase", {"name": phase_name, "done": index, "total": len(rows)}
        encoded_rows.append(row)
    yield "phase", {"name": phase_name, "done": len(rows), "total": len(rows)}
    return encoded_rows
