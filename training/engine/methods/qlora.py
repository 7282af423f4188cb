"""QLoRA (Dettmers et al. 2023): LoRA on a base with 4-bit NormalFloat weights and double
quantization.

The base is quantized while it is loaded (training/engine/modeling/model.py). On CUDA, the optimizer
is paged 8-bit AdamW.
"""

from __future__ import annotations

from training.engine.methods import lora
from training.engine.methods.base import Method

SPEC = Method(
    title="QLoRA",
    description="LoRA on a base quantized to 4 bits. Needs a quarter of the memory for weights; "
    "somewhat slower and slightly less accurate.",
    paper="https://arxiv.org/abs/2305.14314",
    wrap_model=lora.wrap_model,
    check_wrapped_model=lora.check_rank_patterns,
    settings=lora.LORA_SETTINGS,
    has_quantized_base=True,
)
