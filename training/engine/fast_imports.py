"""Imports torch, transformers and peft faster (benchmarks/imports.py), offline and with
deterministic cuBLAS.

Garbage collection during imports frees nothing but visits every object, and importing bitsandbytes
makes torch.compile, which SnapML never uses, search for compilers. Use it only in standalone
programs: it sets environment variables for the entire process.
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
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # cuBLAS is deterministic only with this
}


@contextmanager
def fast_imports() -> Iterator[None]:
    """Pause garbage collection around imports. Imported objects are never freed, so they are frozen
    and later collections skip them.
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
