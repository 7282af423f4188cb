"""Bottleneck adapters (Houlsby et al. 2019; Pfeiffer et al. 2020): small down- and up-projections
after the sublayers.

PEFT has no such tuner, so training/engine/methods/bottleneck_tuner.py adds one. PEFT then saves,
loads and switches these adapters like its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from training.engine.methods.base import Method

if TYPE_CHECKING:
    from training.engine.settings import MethodSettings


def wrap_model(model: Any, config: MethodSettings) -> Any:
    from peft import get_peft_model

    from training.engine.methods.bottleneck_tuner import BottleneckConfig
    from training.engine.methods.module_names import find_mlp_outputs, find_sublayer_outputs

    find_outputs = find_sublayer_outputs if config.adapter_placement == "both" else find_mlp_outputs
    peft_config = BottleneckConfig(
        bottleneck_size=config.bottleneck_size,
        activation=config.activation,
        target_modules=find_outputs(model),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, peft_config)


SPEC = Method(
    title="Bottleneck adapters",
    description="Inserts small layers after attention and feed-forward. Learns well, but inference "
    "is a little slower, because it cannot be merged.",
    paper="https://arxiv.org/abs/1902.00751",
    wrap_model=wrap_model,
    settings=("bottleneck_size", "adapter_placement", "activation"),
    merge_unsupported_reason="Its layers have an activation, so they are not a linear update of a "
    "weight.",
)
