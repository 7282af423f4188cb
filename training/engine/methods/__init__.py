"""The table of fine-tuning methods, each defined in a file of its own. Importing it does not import
torch, because the site uses the table, too.
"""

from __future__ import annotations

from training.engine.methods import bottleneck, full, ia3, lora, prefix, prompt, qlora
from training.engine.methods.base import Method

METHODS: dict[str, Method] = {
    "lora": lora.SPEC,
    "qlora": qlora.SPEC,
    "full": full.SPEC,
    "bottleneck": bottleneck.SPEC,
    "prefix": prefix.SPEC,
    "prompt": prompt.SPEC,
    "ia3": ia3.SPEC,
}
