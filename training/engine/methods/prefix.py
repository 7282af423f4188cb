"""Prefix tuning (Li and Liang 2021): learned keys and values that the attention of every layer
sees in front of the sequence.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from training.engine.methods.base import MIXED_BATCH_UNSUPPORTED, Method

if TYPE_CHECKING:
    from training.engine.settings import MethodSettings


def wrap_model(model: Any, config: MethodSettings) -> Any:
    from peft import PrefixTuningConfig, get_peft_model

    peft_config = PrefixTuningConfig(
        num_virtual_tokens=config.num_virtual_tokens,
        prefix_projection=config.prefix_projection,
        # Size of the projection's hidden layer
        encoder_hidden_size=model.get_input_embeddings().embedding_dim,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, peft_config)


SPEC = Method(
    title="Prefix tuning",
    description="Learns keys and values that every layer attends to. Tiny files; good for style, "
    "weak for new knowledge.",
    paper="https://arxiv.org/abs/2101.00190",
    wrap_model=wrap_model,
    settings=("num_virtual_tokens", "prefix_projection"),
    defaults={"learning_rate": 1e-2},
    learning_rate_range="3e-3 to 3e-2",
    max_learning_rate=0.1,
    incompatible_settings={
        "gradient_checkpointing": "the prefix is stored in the KV cache, which checkpointing "
        "discards.",
        "packing": "the prefix is in front of the sequence, so only its first row would use it.",
    },
    merge_unsupported_reason="A prefix is not an update of weights.",
    mixed_batch_unsupported_reason=MIXED_BATCH_UNSUPPORTED,
)
