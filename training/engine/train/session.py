"""Everything a run holds in memory, made ready: data encoded, model wrapped, optimizer, plan, and
where training stands.

It yields its progress as events; the loop takes it from there.
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
    DataError,
    EncodedRow,
    encode_rows,
    load_tokenizer,
    read_rows,
    use_template,
)
from training.engine.methods import METHODS
from training.engine.modeling import optimizers, weights
from training.engine.modeling.adapter_init import initialize_adapter
from training.engine.modeling.model import (
    LabeledPositionsHead,
    compute_in_bf16,
    count_parameters,
    limit_memory_fraction,
    load_base,
    set_deterministic,
    resolve_device,
    resolve_precision,
    get_weights_dtype,
    wrap_base_model,
)
from training.engine.train import checkpoint
from training.engine.train.memory_meter import MemoryMeter
from training.errors import ConfigError

Event = tuple[str, dict[str, Any]]  # kind and payload; the journal adds number and time
PROGRESS_ROWS = 500
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "safetensors", "tokenizers")


@dataclass
class Session:
    """The state of one attempt. Losses are nats per trained token."""

    config: RunConfig
    run_dir: Path
    device: torch.device
    meter: MemoryMeter
    tokenizer: Any
    rows: list[EncodedRow]
    heldout: list[EncodedRow]
    heldout_rows: list[dict[str, Any]]
    model: Any
    head: LabeledPositionsHead
    optimizer: torch.optim.Optimizer
    start: dict[str, torch.Tensor] | None
    plan: BatchPlan
    step: int = 0
    total_tokens: int = 0
    loss: float | None = None
    eval_loss: float | None = None
    heldout_step: int | None = None
    best_loss: float | None = None
    best_step: int | None = None
    saved_step: int = 0
    failed_saves: int = field(default=0)

    def facts(self) -> dict[str, Any]:
        """What a checkpoint must remember besides tensors."""
        return {
            "total_tokens": self.total_tokens,
            "loss": self.loss,
            "eval_loss": self.eval_loss,
            "heldout_step": self.heldout_step,
            "best_loss": self.best_loss,
            "best_step": self.best_step,
        }

    def trained(self) -> checkpoint.Trained:
        return checkpoint.Trained(self.model, self.optimizer, self.config, self.start)

    def trainable_parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)


def prepare(config: RunConfig, run_dir: Path, attempt: int) -> Iterator[Event | Session]:
    """Load and encode everything; the last thing yielded is the session, after its `start` and
    `resume` events.

    Raises:
        DataError, ConfigError: for the person to read.
    """
    device = resolve_device()
    limit_memory_fraction(device)
    set_deterministic(config, device)
    meter = MemoryMeter(device)
    yield "phase", {"name": "loading tokenizer"}
    tokenizer = load_tokenizer(Path(config.model))
    template = use_template(tokenizer)
    encoded = yield from encode_data(tokenizer, config)
    yield "phase", {"name": "loading model"}
    method = METHODS[config.method]
    precision = resolve_precision(config, device)
    base = load_base(
        Path(config.model), get_weights_dtype(precision), device, quantized=method.has_quantized_base
    )
    parameters = count_parameters(base)
    model = equipped(base, config, device)
    session = Session(
        config=config,
        run_dir=run_dir,
        device=device,
        meter=meter,
        tokenizer=tokenizer,
        rows=encoded.rows,
        heldout=encoded.heldout,
        heldout_rows=encoded.heldout_rows,
        model=model,
        head=LabeledPositionsHead(model),
        optimizer=optimizers.make_optimizer(model, config, device),
        start=weights.copy_initial_state(model, config),
        plan=plan_steps([len(row) for row in encoded.rows], config),
    )
    yield "memory", {"moment": "load", "step": 0, **meter.read()}
    facts = describe_start(session) | encoded.left_out
    yield (
        "start",
        {"attempt": attempt, "chat_template": template, "parameters": parameters, **facts},
    )
    if attempt == 1:  # later the layers may be those of a trial
        method.check_wrapped_model(session.model, config)
    if config.packing:
        session.head.check_packing_isolation(session.model, session.rows[0].ids[: config.max_length // 2])
    yield from resume(session, attempt)
    yield session


class EncodedData(NamedTuple):
    """`rows` and `heldout` have something to train; `left_out` counts what does not, or was cut."""

    rows: list[EncodedRow]
    heldout: list[EncodedRow]
    heldout_rows: list[dict[str, Any]]
    left_out: dict[str, int]


def encode_data(tokenizer: Any, config: RunConfig) -> Generator[Event, None, EncodedData]:
    """Raises DataError: no row has anything to train."""
    train_rows = read_rows(Path(config.train_data))
    heldout_rows = read_rows(Path(config.eval_data))[: config.eval_rows]
    rows: list[EncodedRow] = []
    yield from encode_with_progress(tokenizer, train_rows, rows, config, "tokenizing")
    heldout: list[EncodedRow] = []
    yield from encode_with_progress(
        tokenizer, heldout_rows, heldout, config, "tokenizing held-out rows"
    )
    left_out = {"truncated_rows": sum(row.cut > 0 for row in rows)}
    left_out["empty_rows"] = sum(not row.trained for row in rows)
    rows = [row for row in rows if row.trained]
    if not rows:
        raise DataError(
            f"All {len(train_rows)} rows have nothing to train after {config.max_length} tokens; "
            "raise max_length.",
            field="max_length",
        )
    heldout = [row for row in heldout if row.trained]
    return EncodedData(rows, heldout, heldout_rows, left_out)


def describe_start(session: Session) -> dict[str, object]:
    """What the `start` event tells of data, model and machine."""
    config, device = session.config, session.device
    return {
        "step": 0,
        "total_steps": session.plan.total_steps,
        "epochs": session.plan.epochs,
        "rows": len(session.rows),
        "eval_rows": len(session.heldout),
        "tokens": sum(len(row) for row in session.rows),
        "trained_tokens": sum(row.trained for row in session.rows),
        "trainable_parameters": session.trainable_parameters(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "precision": resolve_precision(config, device),
        "optimizer": config.resolve_optimizer(device.type),
        "threads": torch.get_num_threads(),
        "versions": {name: importlib.metadata.version(name) for name in LIBRARIES},
    }


def equipped(base: Any, config: RunConfig, device: torch.device) -> Any:
    """The base as the technique trains it, computing in the run's precision."""
    model = wrap_base_model(base, config)
    if resolve_precision(config, device) == "mixed":
        compute_in_bf16(model, device)
    return model


def resume(session: Session, attempt: int) -> Iterator[Event]:
    """Go back to the newest whole checkpoint, if there is one."""
    newest = checkpoint.newest_whole(session.run_dir)
    if newest is not None:
        facts = checkpoint.load(newest, session.trained())
        session.step = session.saved_step = facts.pop("step")
        if facts.pop("restarted"):
            words = (
                "The checkpoint is of another optimizer: the weights go on, and the optimizer "
                "begins anew."
            )
            yield "log", {"level": "warning", "text": words}
        for name, value in facts.items():
            setattr(session, name, value)
    elif session.config.start_weights:
        read_start(session)
    elif session.config.init_lora_weights in ("eva", "loftq"):
        yield "phase", {"name": "looking for a start"}
        initialize_adapter(session.model, session.config, session.rows)
    if attempt > 1:
        yield "resume", {"attempt": attempt, "step": session.step}


def read_start(session: Session) -> None:
    """Begin with the weights of a version.

    Raises:
        ConfigError: they are of another shape than what the settings make.
    """
    try:
        weights.check_parameter_names(session.model, Path(session.config.start_weights))
        weights.read_weights(session.model, Path(session.config.start_weights), {})
    except (RuntimeError, KeyError, OSError) as error:
        told = str(error).splitlines()[0][:300]
        raise ConfigError(
            f"The version's weights do not fit these settings: {told}", field="start_weights"
        ) from error


def encode_with_progress(
    tokenizer: Any,
    rows: Sequence[dict[str, Any]],
    into: list[EncodedRow],
    config: RunConfig,
    name: str,
) -> Iterator[Event]:
    encoded = encode_rows(
        tokenizer, rows, max_length=config.max_length, train_on_prompt=config.train_on_prompt
    )
    for done, row in enumerate(encoded):
        if done % PROGRESS_ROWS == 0:
            yield "phase", {"name": name, "done": done, "total": len(rows)}
        into.append(row)
    yield "phase", {"name": name, "done": len(rows), "total": len(rows)}
