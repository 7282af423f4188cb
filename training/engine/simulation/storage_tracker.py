"""Follows every storage of fake tensors from birth to death and keeps what was alive after each
operator of a step.

Nothing here is allocated: a FakeTensor has a shape and no bytes. The mode sees each operator below
autograd.
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

CUDA_BLOCK = 512  # bytes that CUDA's caching allocator rounds up to


class StorageTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """`kind` names what is born now (weights, activations, ...), `stretch` where in the step we
    are.

    `moments[stretch]` has a row for each operator: bytes by kind (KINDS) while its result and its
    temporaries are there.
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
        """These are of this kind from now on, whatever was born when they were."""
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
        """Remember this moment; `more` bytes are gone again right after it."""
        totals = [self._bytes[kind] for kind in MEMORY_KINDS]
        totals[-1] += extra_bytes
        self.snapshots.setdefault(self.phase, []).append(tuple(totals))

    @staticmethod
    def _count_cast_bytes(func: Any, args: Any, out: Any) -> int:
        """Copies that a CPU's pointwise kernel makes of operands in another dtype, for as long as
        it runs (measured: without them two of 32 cells were off by 8 %).
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
