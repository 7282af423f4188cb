"""IA3 (Liu et al. 2022): learned scales for keys, values and the feed-forward's inner features.

The worked example of CONTRIBUTING.md: a technique is this file and its row in the table.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from training.engine.methods.base import ONE_AT_A_TIME, Method

if TYPE_CHECKING:
    from training.engine.settings import TechniqueSettings


def wrap(model: Any, _config: TechniqueSettings) -> Any:
    from peft import IA3Config, get_peft_model

    from training.engine.methods.module_names import feed_forward_ends, keys_and_values

    inner = feed_forward_ends(model)
    peft_config = IA3Config(
        target_modules=[*keys_and_values(model), *inner],
        feedforward_modules=inner,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, peft_config)


METHOD = Method(
    title="IA3",
    words="Learns one scale for each feature of keys, values and feed-forward. Very few "
    "parameters; can be merged.",
    paper="https://arxiv.org/abs/2205.05638",
    wrap=wrap,
    usual={"learning_rate": 5e-3},
    rates="1e-3 to 1e-2",
    highest_rate=5e-2,
    no_mix=ONE_AT_A_TIME,
)
