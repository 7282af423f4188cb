"""QLoRA (Dettmers et al. 2023): LoRA on a base of 4-bit NormalFloat weights with double
quantisation.

The base is quantised while it is loaded (training/engine/modeling/model.py); on CUDA the optimizer
is paged 8-bit AdamW.
"""

from __future__ import annotations

from training.engine.methods import lora
from training.engine.methods.base import Method

SPEC = Method(
    title="QLoRA",
    description="LoRA on a base squeezed to 4 bits: a quarter of the weights' memory, somewhat slower, "
    "a little less exact.",
    paper="https://arxiv.org/abs/2305.14314",
    wrap_model=lora.wrap_model,
    check_wrapped_model=lora.check_rank_patterns,
    settings=lora.LORA_SETTINGS,
    has_quantized_base=True,
)
