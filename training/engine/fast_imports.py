"""How the programs that compute import torch, transformers and peft: quicker
(benchmarks/imports.py), offline and repeatable.

A collection in the midst of imports finds nothing and looks at everything, and bitsandbytes asks
torch.compile, which SnapML never uses, for compilers that it then leaves alone. Only programs of
their own import this way: it sets the environment of the whole process.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

IMPORT_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TORCHDYNAMO_DISABLE": "1",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # needed for repeatable cuBLAS
}


@contextmanager
def fast_imports() -> Iterator[None]:
    """Import inside this. What the imports left in memory is for good, and later collections need
    not look at it.
    """
    is_first_import = "torch" not in sys.modules
    for name, value in IMPORT_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    is_gc_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if is_first_import:
            gc.freeze()
        if is_gc_enabled:
            gc.enable()
