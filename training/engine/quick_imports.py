"""How the programs that compute import torch, transformers and peft: in 3.7 s of CPU time instead of 6.0 (2-core Xeon).

A collection in the midst of imports finds nothing and looks at everything (1.3 s), and bitsandbytes asks torch.compile, which
SnapML never uses, for 1.4 s of compilers that it then leaves alone.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager

SURROUNDINGS = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TORCHDYNAMO_DISABLE": "1",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # needed for repeatable cuBLAS
}


@contextmanager
def quick_imports() -> Iterator[None]:
    """Import inside this. What is in memory afterwards is for good, and later collections need not look at it."""
    for name, value in SURROUNDINGS.items():
        os.environ.setdefault(name, value)
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if collects:
            gc.enable()
