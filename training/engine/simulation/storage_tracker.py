"""Track every storage of fake tensors from allocation to release, and record the live bytes after
each operator of a step.

A FakeTensor has a shape but no memory, so nothing is allocated. The dispatch mode sees each
operator below autograd.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from training.engine.memory_estimator import MEMORY_KINDS

CUDA_BLOCK = 512  # CUDA's caching allocator rounds up to this many bytes


class StorageTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A dispatch mode that records live bytes by kind.

    `kind` is the kind of storages that are allocated now (weights, activations, ...), `phase` the
    current phase of the step. `snapshots[phase]` has a row for each operator: bytes by kind
    (MEMORY_KINDS) while the operator's result and temporaries are alive.
    """

    def __init__(self, device: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device = device
        self.kind = "weights"
        self.phase = "load"
        self.snapshots: dict[str, list[tuple[int, ...]]] = {}
        self._alive: dict[int, tuple[Any, str, int]] = {}
        self._bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._track_storage(tensor)
        self._take_snapshot(self._count_cast_bytes(func, args, out) if self.device == "cpu" else 0)
        return out

    def enter_phase(self, phase: str, kind: str) -> None:
        self.phase, self.kind = phase, kind

    def relabel_tensors(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Change the kind of storages that are already tracked."""
        for tensor in tensors:
            key = tensor.untyped_storage()._cdata
            if key not in self._alive:
                self._track_storage(tensor)
            ref, old, size = self._alive[key]
            self._bytes[old] -= size
            self._bytes[kind] += size
            self._alive[key] = (ref, kind, size)

    def reset_snapshots(self) -> None:
        self.snapshots = {}

    def _track_storage(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            return
        size = storage.nbytes()
        if self.device == "cuda":
            size = -(-size // CUDA_BLOCK) * CUDA_BLOCK
        self._alive[key] = (
            weakref.ref(storage, lambda _: self._release_storage(key)),
            self.kind,
            size,
        )
        self._bytes[self.kind] += size

    def _release_storage(self, key: int) -> None:
        _, kind, size = self._alive.pop(key)
        self._bytes[kind] -= size

    def _take_snapshot(self, extra_bytes: int) -> None:
        """Record the live bytes. `extra_bytes` are temporary and released right after."""
        totals = [self._bytes[kind] for kind in MEMORY_KINDS]
        totals[-1] += extra_bytes
        self.snapshots.setdefault(self.phase, []).append(tuple(totals))

    @staticmethod
    def _count_cast_bytes(func: Any, args: Any, out: Any) -> int:
        """Bytes of the temporary copies that a CPU's pointwise kernel makes of operands in another
        dtype. Without them, the forecast of two of 32 measured cells was off by 8%.
        """
        if torch.Tag.pointwise not in func.tags or not isinstance(out, Tensor):
            return 0
        tensors = [
            a
            for a in tree_leaves(args)
            if isinstance(a, Tensor) and a.dim() > 0 and a.is_floating_point()
        ]
        if len(tensors) < 2:
            return 0
        common_dtype = max((t.dtype for t in tensors), key=lambda dtype: dtype.itemsize)
        return sum(t.numel() * common_dtype.itemsize for t in tensors if t.dtype != common_dtype)
