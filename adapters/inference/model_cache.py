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

from adapters.inference.loaded_model import Held
from adapters.inference.types import Base

SHARE = 0.4  # of the memory that is there, for bases
# For the caches of answers under way; the rest is for adapters, and on a CPU for training
CACHE_SHARE = 0.2


class NoRoom(Exception):
    """Every base in memory is being asked."""


class Residents:
    def __init__(self, room_bytes: int | None = None) -> None:
        self.room_bytes = room_bytes or int(SHARE * memory_bytes())
        self.cache_bytes = int(CACHE_SHARE * memory_bytes())
        self.held: OrderedDict[Base, Held] = OrderedDict()

    def get(self, base: Base, busy: Set[Base]) -> Held:
        """The base, loaded if need be. Those that are `busy` stay. One that is larger than the room
        is tried alone.

        Raises:
            NoRoom: it fits only when one that is busy has left; or it is busy, and has to be loaded
                anew.
            ConfigError: its folder holds no model.
        """
        if base in self.held and self.held[base].spoilt:
            if base in busy:
                raise NoRoom
            del self.held[base]
        if base not in self.held:
            self.make_room(stored_bytes(base.folder), busy)
            self.held[base] = Held(base)
        self.held.move_to_end(base)
        return self.held[base]

    def make_room(self, needed: int, busy: Set[Base]) -> None:
        for base in list(self.held):
            if self.used_bytes + needed <= self.room_bytes:
                return
            if base not in busy:
                del self.held[base]
        if self.held and self.used_bytes + needed > self.room_bytes:
            raise NoRoom

    def let_go(self) -> None:
        """Nobody asks any more."""
        self.held.clear()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @property
    def used_bytes(self) -> int:
        return sum(held.size_bytes for held in self.held.values())


def stored_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def memory_bytes() -> int:
    if torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(0).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
