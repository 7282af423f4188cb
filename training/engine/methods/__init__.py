"""The techniques, one file each, and the one table of them. No torch at import: the site reads this
table, too.
"""

from __future__ import annotations

from training.engine.methods import bottleneck, full, ia3, lora, prefix, prompt, qlora
from training.engine.methods.base import Method

TABLE: dict[str, Method] = {
    "lora": lora.METHOD,
    "qlora": qlora.METHOD,
    "full": full.METHOD,
    "bottleneck": bottleneck.METHOD,
    "prefix": prefix.METHOD,
    "prompt": prompt.METHOD,
    "ia3": ia3.METHOD,
}
