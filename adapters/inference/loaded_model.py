"""A base model in memory with the adapters beside it. It knows no questions.

PEFT puts only adapters of one type beside a base, so those of another type wait until this one's
have answered (`fits`).
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch

from adapters.inference.multi_lora import Rows, weave
from adapters.inference.types import Base, Weights
from training.engine.data.conversations import load_tokenizer, ensure_chat_template
from training.engine.modeling.library_patches import MIXED_BATCH_TUNERS
from training.engine.modeling.model import get_fastest_dtype, load_base, resolve_device
from training.engine.modeling.weights import load_adapter

MAX_ADAPTERS = 16  # loaded beside a base; the least recently used one leaves
UNKNOWN = "?"


class Held:
    """Raises ConfigError: the base's folder holds no model that can be loaded."""

    def __init__(self, base: Base) -> None:
        self.base = base
        self.device = resolve_device()
        self.tokenizer = load_tokenizer(base.folder)
        ensure_chat_template(self.tokenizer)
        self.model: Any = load_base(
            base.folder, get_fastest_dtype(self.device), self.device, quantized=base.quantised
        ).eval()
        ends = self.model.generation_config.eos_token_id
        self.stop_ids: set[int] = {
            self.tokenizer.eos_token_id,
            *(ends if isinstance(ends, list) else [ends]),
        } - {None}
        self.longest: int = (
            getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or 2**31
        )
        self.takes_positions = "position_ids" in inspect.signature(self.model.forward).parameters
        self.kind = ""
        self.loaded: OrderedDict[Weights, str] = OrderedDict()
        self._through: Weights | str | None = UNKNOWN
        self._rows = Rows()
        self._woven = False  # do the layers ask `_rows`, and PEFT nothing?
        self.entry_bytes = 0  # of a token in a cache, once one was seen
        self.spoilt = False  # a load broke off half-way, and what is in the layers now is nobody's

    def fits(self, adapter: Weights | None) -> bool:
        """Can this be asked beside what is held, without anything leaving?"""
        return adapter is None or not self.loaded or adapter.kind == self.kind

    @property
    def size_bytes(self) -> int:
        return sum(p.nbytes for p in self.model.parameters())

    @property
    def prompted(self) -> bool:
        """Are the adapters prompts or prefixes, which stand before the text and change no layer?"""
        return bool(self.loaded) and self.model.active_peft_config.is_prompt_learning

    @property
    def mixes(self) -> bool:
        """May rows of several adapters share a batch? Most tuners would ignore whose row it is
        (training/engine/modeling/library_patches.py).
        """
        return not self.loaded or self.prompted or self.kind in MIXED_BATCH_TUNERS

    def bring(self, adapter: Weights | None, in_use: set[Weights]) -> None:
        """Have this adapter beside the base. Those `in_use` stay."""
        if adapter is None:
            return
        if adapter not in self.loaded:
            self._load(adapter)
            self._drop_oldest(in_use)
        self.loaded.move_to_end(adapter)

    def first(self, ids: torch.Tensor, adapter: Weights | None, *, every: bool = False) -> Any:
        """A question's first forward: logits of its last place (or `every` one) for ids of shape
        (1, n), and the cache.
        """
        keep = 0 if every else 1
        if self._woven:
            self._say([adapter])
        if self._woven or (self.prompted and adapter is None):
            return self.model.get_base_model()(input_ids=ids, use_cache=True, logits_to_keep=keep)
        self._go_through(adapter)
        return self.model(input_ids=ids, use_cache=True, logits_to_keep=keep)

    def next(self, given: dict[str, Any], adapters: Sequence[Weights | None]) -> Any:
        """A forward of one token a row, each through its own adapter; `given` are a causal model's
        own arguments.

        A prompt or prefix is in the cache since the first forward, so these go to the base itself.
        """
        if self._woven:
            self._say(adapters)
        if self._woven or self.prompted:
            return self.model.get_base_model()(**given)
        if len(set(adapters)) == 1:
            self._go_through(adapters[0])
            return self.model(**given)
        if self._through in (None, UNKNOWN):
            self._go_through(next(adapter for adapter in adapters if adapter is not None))
        names = ["__base__" if adapter is None else self.loaded[adapter] for adapter in adapters]
        return self.model(**given, adapter_names=names)

    def _say(self, adapters: Sequence[Weights | None]) -> None:
        self._rows.are(
            tuple(None if adapter is None else self.loaded[adapter] for adapter in adapters)
        )

    def _go_through(self, adapter: Weights | None) -> None:
        """Switch the layers to an adapter, or off; nothing is done if they are so already."""
        if not self.loaded or self._through == adapter:
            return
        if adapter is None:
            self.model.base_model.disable_adapter_layers()
        else:
            if not self.prompted:
                self.model.base_model.enable_adapter_layers()
            self.model.set_adapter(self.loaded[adapter])
        self._through = adapter

    def _load(self, adapter: Weights) -> None:
        name = f"adapter-{adapter.folder.name}-{adapter.sha256[:12]}"
        self.spoilt = True
        self._woven = False
        self._rows.are(None)
        if self.loaded and adapter.kind == self.kind:
            self.model.load_adapter(adapter.folder, adapter_name=name)
        else:
            self.model = self._plain()
            self.loaded.clear()  # before what may fail: nothing is beside the base now
            self.model = load_adapter(self.model, adapter.folder, name)
            self.kind = adapter.kind
        self.loaded[adapter] = name
        self._through = UNKNOWN
        self._woven = self.kind == "LORA" and weave(self.model, self._rows)
        self.spoilt = False

    def _plain(self) -> Any:
        """The base without what PEFT put into it."""
        if not self.loaded:
            return self.model
        return self.model.get_base_model() if self.prompted else self.model.unload()

    def _drop_oldest(self, in_use: set[Weights]) -> None:
        for weights in list(self.loaded)[:-1]:
            if len(self.loaded) <= MAX_ADAPTERS:
                return
            if weights not in in_use:
                self.model.delete_adapter(self.loaded.pop(weights))
                self._through = UNKNOWN
