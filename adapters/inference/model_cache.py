"""The base models in memory, within a bound: the least recently used one that nobody asks leaves
for another.
"""

from __future__ import annotations

import gc
import os
from collections import OrderedDict
from collections.abc import Set
from pathlib import Path

import torch

from adapters.inference.loaded_model import LoadedModel
from adapters.inference.types import BaseRef

MODEL_MEMORY_FRACTION = 0.4  # of the memory that is there, for bases
# For the caches of answers under way; the rest is for adapters, and on a CPU for training
KV_CACHE_FRACTION = 0.2


class CapacityExceeded(Exception):
    """Every base in memory is being asked."""


class ModelCache:
    def __init__(self, capacity_bytes: int | None = None) -> None:
        self.capacity_bytes = capacity_bytes or int(MODEL_MEMORY_FRACTION * total_memory_bytes())
        self.kv_cache_bytes = int(KV_CACHE_FRACTION * total_memory_bytes())
        self.models: OrderedDict[BaseRef, LoadedModel] = OrderedDict()

    def get_model(self, base: BaseRef, busy: Set[BaseRef]) -> LoadedModel:
        """The base, loaded if need be. Those that are `busy` stay. One that is larger than the room
        is tried alone.

        Raises:
            CapacityExceeded: it fits only when one that is busy has left; or it is busy, and has to be loaded
                anew.
            ConfigError: its folder holds no model.
        """
        if base in self.models and self.models[base].is_broken:
            if base in busy:
                raise CapacityExceeded
            del self.models[base]
        if base not in self.models:
            self.evict_models(stored_bytes(base.folder), busy)
            self.models[base] = LoadedModel(base)
        self.models.move_to_end(base)
        return self.models[base]

    def evict_models(self, needed_bytes: int, busy: Set[BaseRef]) -> None:
        for base in list(self.models):
            if self.used_bytes + needed_bytes <= self.capacity_bytes:
                return
            if base not in busy:
                del self.models[base]
        if self.models and self.used_bytes + needed_bytes > self.capacity_bytes:
            raise CapacityExceeded

    def evict_all(self) -> None:
        """Nobody asks any more."""
        self.models.clear()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @property
    def used_bytes(self) -> int:
        return sum(model.size_bytes for model in self.models.values())


def stored_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def total_memory_bytes() -> int:
    if torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(0).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
