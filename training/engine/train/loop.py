"""The training loop of every method: step, evaluate, save, and check whether to stop.

It yields events; the attempt writes them to the journal.
"""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Iterator

import torch
from safetensors import SafetensorError

from training.engine.modeling import optimizers
from training.engine.outcome import Outcome
from training.engine.stop_requests import StopRequests
from training.engine.train import checkpoint, evaluate
from training.engine.train.session import Event, Session
from training.errors import find_storage_error


class Diverged(Exception):
    """The loss or its gradient is not finite. The weights are still those of the previous step."""


def run_training_loop(
    session: Session, stop_requests: StopRequests
) -> Generator[Event, None, Outcome]:
    """Train until all planned steps are done or a stop is requested. Returns the outcome.

    Raises:
        Diverged: before the optimizer step, so the weights stay valid.
        OSError, SafetensorError: after two saves on a full disk, at the final one, or another
            failed save.
        torch.OutOfMemoryError: from CUDA.
    """
    config, plan = session.config, session.plan
    session.model.train()
    if session.step == 0:
        yield from evaluate.evaluate_loss(session)
        yield from evaluate.generate_sample(session)
    yield "phase", {"name": "first step" if session.step == 0 else "training"}

    while session.step < plan.total_steps:
        stop_outcome = stop_requests.get_requested_stop()
        if stop_outcome is not None:
            if stop_outcome is not Outcome.DISCARDED:
                yield from save_checkpoint(session, is_final=True)
            return stop_outcome

        # Checked before each step, so an attempt that resumes at this point stops here as well
        if should_stop_early(session):
            yield from save_checkpoint(session, is_final=True)
            patience = config.early_stopping_patience
            evaluations = f"{patience} evaluation{'s' if patience > 1 else ''}"
            message = (
                f"Early stopping: the held-out loss has not improved in {evaluations}. "
                f"Best step: {session.best_step}."
            )
            yield "log", {"level": "info", "text": message}
            break

        kind, fields = take_step(session)
        yield kind, fields
        if session.step == 1:
            memory = {
                name: value
                for name, value in fields.items()
                if name.startswith("memory") or name == "devices"
            }
            yield "memory", {"moment": "first step", "step": 1, **memory}
            # The next phase event may be far away
            yield "phase", {"name": "training"}
        is_last = session.step == plan.total_steps

        if is_last or session.step % config.eval_steps == 0:
            yield from evaluate.evaluate_loss(session)
            yield from evaluate.generate_sample(session)
            yield "phase", {"name": "training"}
        is_best = config.export_checkpoint == "best" and session.best_step == session.step
        if is_last or is_best or session.step % config.save_steps == 0:
            yield from save_checkpoint(session, is_final=is_last)
    return Outcome.FINISHED


def should_stop_early(session: Session) -> bool:
    """Whether the held-out loss has not improved in `early_stopping_patience` evaluations.

    It is computed from step numbers, so a resumed run gets the same answer.
    """
    if (
        not session.config.early_stopping_patience
        or session.best_step is None
        or session.last_eval_step != session.step
    ):
        return False
    steps_since_best = session.step - session.best_step
    return steps_since_best >= session.config.early_stopping_patience * session.config.eval_steps


def take_step(session: Session) -> Event:
    """Run one optimizer step over `gradient_accumulation_steps` batches. The loss is the mean over
    the trained tokens of all batches.
    """
    began = time.monotonic()
    batches = session.plan.steps[session.step]
    rows = [session.rows[i] for batch in batches for packed in batch for i in packed]
    trained_tokens, tokens = sum(row.trained_tokens for row in rows), sum(len(row) for row in rows)
    session.step += 1
    learning_rate = session.config.learning_rate_at(session.step, session.plan.total_steps)
    for group in session.optimizer.param_groups:
        group["lr"] = learning_rate * group["rate"]  # LoRA+ has two groups with different rates

    total = torch.zeros((), device=session.device)
    for batch in batches:
        tensors = evaluate.collate(
            batch, session.rows, session.tokenizer.pad_token_id, session.device
        )
        loss_sum = session.head.compute_loss_sum(session.model, *tensors)
        (loss_sum / trained_tokens).backward()  # type: ignore[no-untyped-call]
        total += loss_sum.detach()
    parameters = optimizers.get_parameters(session.optimizer)
    gradient_norm = torch.nn.utils.clip_grad_norm_(parameters, session.config.max_grad_norm).item()
    loss = total.item() / trained_tokens
    if not (math.isfinite(loss) and math.isfinite(gradient_norm)):
        session.step -= 1
        saved = session.saved_step
        checkpoint_message = f"The checkpoint of step {saved} is kept. " if saved else ""
        raise Diverged(
            f"The loss became {loss:g} (gradient norm {gradient_norm:g}) at step "
            f"{session.step + 1}. {checkpoint_message}Try a learning rate below "
            f"{session.config.learning_rate:g}."
        )
    session.optimizer.step()
    session.optimizer.zero_grad(set_to_none=True)

    session.loss = loss
    session.total_tokens += tokens
    seconds = time.monotonic() - began
    return (
        "step",
        {
            "step": session.step,
            "loss": loss,
            "learning_rate": learning_rate,
            "gradient_norm": gradient_norm,
            "tokens": tokens,
            "trained_tokens": trained_tokens,
            "total_tokens": session.total_tokens,
            "tokens_per_second": tokens / seconds,
            "seconds": seconds,
            **session.meter.read_memory(),
        },
    )


def save_checkpoint(session: Session, *, is_final: bool) -> Iterator[Event]:
    """Write a checkpoint of this step unless it exists. The first full disk is a warning; the
    second in a row, or one at the attempt's final checkpoint, ends the run. Otherwise it would
    report success although steps or the adapter are lost.
    """
    if session.saved_step == session.step or session.step == 0:
        return
    yield "saving", {"step": session.step}
    began = time.monotonic()
    try:
        folder = checkpoint.save_checkpoint(
            session.run_dir,
            session.step,
            session.get_checkpoint_state(),
            session.get_trainer_state(),
        )
    except (OSError, SafetensorError) as error:
        storage_error = find_storage_error(error)
        is_full = storage_error is not None and storage_error.code == "disk_full"
        if is_final or not is_full or not session.run_dir.is_dir():
            raise
        session.failed_saves += 1
        if session.failed_saves > 1:
            raise
        yield (
            "log",
            {
                "level": "warning",
                "text": f"The disk is full: the checkpoint of step {session.step} was not saved. "
                "Training continues.",
            },
        )
        return
    session.saved_step, session.failed_saves = session.step, 0
    checkpoint.prune_checkpoints(session.run_dir, session.best_step)
    yield (
        "checkpoint",
        {
            "step": session.step,
            "path": str(folder.relative_to(session.run_dir)),
            "bytes": sum(path.stat().st_size for path in folder.iterdir()),
            "seconds": time.monotonic() - began,
            "best": session.best_step == session.step,
        },
    )
    yield "memory", {"moment": "save", "step": session.step, **session.meter.read_memory()}
