"""Full fine-tuning: every weight of the model is trained. No adapter; what is saved is the model
itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from training.engine.methods.base import Method

if TYPE_CHECKING:
    from training.engine.settings import TechniqueSettings


def wrap(model: Any, _config: TechniqueSettings) -> Any:
    model.requires_grad_(True)
    return model


METHOD = Method(
    title="Full fine-tuning",
    words="Trains every weight. Learns most and forgets most; takes four to five times the "
    "model's memory.",
    paper="https://arxiv.org/abs/1801.06146",
    wrap=wrap,
    usual={"learning_rate": 2e-5},
    rates="5e-6 to 5e-5",
    highest_rate=2e-4,
    whole_model=True,
    no_merge="There is nothing to merge: the trained model is whole.",
    no_mix="It is a model of its own, not an adapter beside a base.",
)
