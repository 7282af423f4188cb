"""The base models in memory, up to a limit. The least recently used idle one is evicted first."""

from __future__ import annotations

import gc
import os
from collections import OrderedDict
from collections.abc import Set
from pathlib import Path

import torch

from adapters.inference.loaded_model import LoadedModel
from adapters.inference.types import BaseRef

# Of the GPU's memory, or of the machine's without a GPU. The rest is for adapters and activations,
# and on a CPU for training.
MODEL_MEMORY_FRACTION = 0.4
KV_CACHE_FRACTION = 0.2


class CapacityExceeded(Exception):
    """There is no room for the model while others are busy. Try again when one is idle."""


class ModelCache:
    """Base models by their reference, least recently used first. Belongs to the scheduler, whose
    thread alone uses it.
    """

    def __init__(self, capacity_bytes: int | None = None) -> None:
        self.capacity_bytes = capacity_bytes or int(MODEL_MEMORY_FRACTION * total_memory_bytes())
        self.kv_cache_bytes = int(KV_CACHE_FRACTION * total_memory_bytes())
        self.models: OrderedDict[BaseRef, LoadedModel] = OrderedDict()

    def get_model(self, base: BaseRef, busy: Set[BaseRef]) -> LoadedModel:
        """The model, loaded if needed. Models that are `busy` are not evicted. A model larger than
        the capacity is loaded alone.

        Raises:
            CapacityExceeded: it does not fit beside the busy models, or it must be reloaded and is
                busy itself.
            ConfigError: the folder has no model that can be loaded.
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
        """Free all memory, GPU memory included."""
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
