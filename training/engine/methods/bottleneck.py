"""Bottleneck adapters (Houlsby et al. 2019; Pfeiffer et al. 2020): small down- and up-projections
after the sublayers.

PEFT has no such tuner; training/engine/methods/bottleneck_tuner.py is one, so that saving, loading,
switching and naming are PEFT's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from training.engine.methods.base import Method

if TYPE_CHECKING:
    from training.engine.settings import TechniqueSettings


def wrap(model: Any, config: TechniqueSettings) -> Any:
    from peft import get_peft_model

    from training.engine.methods.bottleneck_tuner import BottleneckConfig
    from training.engine.methods.module_names import feed_forward_ends, sublayer_ends

    find = sublayer_ends if config.adapter_placement == "both" else feed_forward_ends
    peft_config = BottleneckConfig(
        bottleneck_size=config.bottleneck_size,
        activation=config.activation,
        target_modules=find(model),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, peft_config)


METHOD = Method(
    title="Adapter layers",
    words="Puts small layers after attention and feed-forward. Learns well; answers a little "
    "slower, since it cannot be merged.",
    paper="https://arxiv.org/abs/1902.00751",
    wrap=wrap,
    settings=("bottleneck_size", "adapter_placement", "activation"),
    no_merge="Its layers have a curve in them, so they cannot be folded into a weight.",
)
