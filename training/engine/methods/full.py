"""Full fine-tuning: trains all weights of the model and saves the model, without an adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from training.engine.methods.base import Method

if TYPE_CHECKING:
    from training.engine.settings import MethodSettings


def wrap_model(model: Any, _config: MethodSettings) -> Any:
    model.requires_grad_(True)
    return model


SPEC = Method(
    title="Full fine-tuning",
    description="Trains all weights. Learns most, but also forgets most; needs four to five times "
    "the model's memory.",
    paper="https://arxiv.org/abs/1801.06146",
    wrap_model=wrap_model,
    defaults={"learning_rate": 2e-5},
    learning_rate_range="5e-6 to 5e-5",
    max_learning_rate=2e-4,
    is_full_finetuning=True,
    merge_unsupported_reason="It has no adapter to merge: the result is a complete model.",
    mixed_batch_unsupported_reason="The result is a complete model, not an adapter on a base.",
)
