"""The base model in memory and the adapters beside it. It knows no questions.

PEFT puts only adapters of one type beside a base, so those of another type wait until this one's have answered (`fits`).
"""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from training.engine.conversations import load_tokenizer, use_template
from training.engine.model import fastest_dtype, load_base, pick_device
from training.engine.weights import attach

MAX_ADAPTERS = 4  # loaded beside the base; the least recently used one leaves


class Base(NamedTuple):
    """A model's folder, in 4 bits or not; `sha256` tells the weights of a run that trained the whole model."""

    folder: Path
    quantised: bool = False
    sha256: str = ""


class Weights(NamedTuple):
    """An adapter's folder and the hash of its weights: other weights in the same folder are another adapter."""

    folder: Path
    sha256: str

    @property
    def kind(self) -> str:
        """PEFT's type of it."""
        return str(json.loads((self.folder / "adapter_config.json").read_text())["peft_type"])


class Held:
    def __init__(self) -> None:
        self.device = pick_device()
        self.base: Base | None = None
        self.model: Any = None
        self.tokenizer: Any = None
        self.stop_ids: set[int] = set()
        self.kind = ""
        self.loaded: OrderedDict[Weights, str] = OrderedDict()

    def fits(self, base: Base, adapter: Weights | None) -> bool:
        """Can this be asked beside what is held, without anything leaving?"""
        return base == self.base and (adapter is None or not self.loaded or adapter.kind == self.kind)

    def load_base(self, base: Base) -> None:
        self.model, self.base = None, None
        self.loaded.clear()
        self.tokenizer = load_tokenizer(base.folder)
        use_template(self.tokenizer)
        dtype = fastest_dtype(self.device)
        self.model = load_base(base.folder, dtype, self.device, quantised=base.quantised).eval()
        ends = self.model.generation_config.eos_token_id
        self.stop_ids = {self.tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
        self.base = base

    def use(self, adapter: Weights | None, in_use: set[Weights | None]) -> None:
        """Make the next forward go through this adapter, or through none. Those `in_use` stay."""
        if adapter is None:
            if self.loaded and not self.prompted:
                self.model.base_model.disable_adapter_layers()
            return
        if adapter not in self.loaded:
            self._load(adapter)
            self._drop_oldest(in_use)
        self.loaded.move_to_end(adapter)
        if not self.prompted:
            self.model.base_model.enable_adapter_layers()
        self.model.set_adapter(self.loaded[adapter])

    @property
    def prompted(self) -> bool:
        """Are the adapters prompts or prefixes, which stand before the text and change no layer?"""
        return bool(self.loaded) and self.model.active_peft_config.is_prompt_learning

    def forward(self, ids: torch.Tensor, cache: Any, adapter: Weights | None) -> Any:
        """Logits of the last place for ids of shape (1, n), and the cache with them in it.

        A prompt or prefix is in the cache after the first call, so what follows goes to the base itself.
        """
        if self.prompted and (adapter is None or cache is not None):
            return self.model.get_base_model()(input_ids=ids, cache=cache, use_cache=True, logits_to_keep=1)
        begun = {} if self.prompted else {"cache": cache}
        return self.model(input_ids=ids, use_cache=True, logits_to_keep=1, **begun)

    def _load(self, adapter: Weights) -> None:
        name = f"adapter-{adapter.folder.name}-{adapter.sha256[:12]}"
        if self.loaded and adapter.kind == self.kind:
            self.model.load_adapter(adapter.folder, adapter_name=name)
        else:
            self.model = self._plain()
            self.loaded.clear()  # before what may fail: nothing is beside the base now
            self.model = attach(self.model, adapter.folder, name)
            self.kind = adapter.kind
        self.loaded[adapter] = name

    def _plain(self) -> Any:
        """The base without what PEFT put into it."""
        if not self.loaded:
            return self.model
        return self.model.get_base_model() if self.prompted else self.model.unload()

    def _drop_oldest(self, in_use: set[Weights | None]) -> None:
        for weights in list(self.loaded)[:-1]:
            if len(self.loaded) <= MAX_ADAPTERS:
                return
            if weights not in in_use:
                self.model.delete_adapter(self.loaded.pop(weights))
