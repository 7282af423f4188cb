"""Prefix tuning (Li and Liang 2021): learned keys and values stand in front of every layer's
attention.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from training.engine.methods.base import ONE_AT_A_TIME, Method

if TYPE_CHECKING:
    from training.engine.settings import TechniqueSettings


def wrap(model: Any, config: TechniqueSettings) -> Any:
    from peft import PrefixTuningConfig, get_peft_model

    peft_config = PrefixTuningConfig(
        num_virtual_tokens=config.num_virtual_tokens,
        prefix_projection=config.prefix_projection,
        # of the projection's inner layer
        encoder_hidden_size=model.get_input_embeddings().embedding_dim,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, peft_config)


METHOD = Method(
    title="Prefix tuning",
    words="Learns keys and values that every layer attends to. Tiny files; good at style, weak at "
    "new knowledge.",
    paper="https://arxiv.org/abs/2101.00190",
    wrap=wrap,
    settings=("num_virtual_tokens", "prefix_projection"),
    usual={"learning_rate": 1e-2},
    rates="3e-3 to 3e-2",
    highest_rate=0.1,
    never={
        "gradient_checkpointing": "the prefix lives in the attention cache, which checkpointing "
        "throws away.",
        "packing": "the prefix stands in front of a sequence, and only its first row would see it.",
    },
    no_merge="A prefix is not an update of weights.",
    no_mix=ONE_AT_A_TIME,
)
