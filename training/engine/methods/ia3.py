"""IA3 (Liu et al. 2022): learned scales for keys, values and the inner features of feed-forward.

This is the worked example of CONTRIBUTING.md: a method is one such file and its row in the table.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from training.engine.methods.base import MIXED_BATCH_UNSUPPORTED, Method

if TYPE_CHECKING:
    from training.engine.settings import MethodSettings


def wrap_model(model: Any, _config: MethodSettings) -> Any:
    from peft import IA3Config, get_peft_model

    from training.engine.methods.module_names import find_key_value_projections, find_mlp_outputs

    mlp_outputs = find_mlp_outputs(model)
    peft_config = IA3Config(
        target_modules=[*find_key_value_projections(model), *mlp_outputs],
        feedforward_modules=mlp_outputs,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, peft_config)


SPEC = Method(
    title="IA3",
    description="Learns one scale per feature of keys, values and feed-forward. Very few "
    "parameters; can be merged.",
    paper="https://arxiv.org/abs/2205.05638",
    wrap_model=wrap_model,
    defaults={"learning_rate": 5e-3},
    learning_rate_range="1e-3 to 1e-2",
    max_learning_rate=5e-2,
    mixed_batch_unsupported_reason=MIXED_BATCH_UNSUPPORTED,
)
