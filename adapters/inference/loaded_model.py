"""A base model in memory with its adapters. It knows nothing of requests.

PEFT attaches adapters of only one type at a time to a base model, so requests for another type wait
until the current ones are finished (`LoadedModel.is_compatible`).
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch

from adapters.inference.answer_format import CallFormat, find_reasoning_tags
from adapters.inference.call_probe import find_call_format
from adapters.inference.multi_lora import RowAdapters, patch_lora_layers
from adapters.inference.types import AdapterRef, BaseRef
from training.engine.data.conversations import (
    ensure_chat_template,
    load_tokenizer,
    render_messages,
)
from training.engine.data.errors import DataError, TemplateTooSlow
from training.engine.modeling.library_patches import MIXED_BATCH_TUNERS
from training.engine.modeling.model import get_fastest_dtype, load_base, resolve_device
from training.engine.modeling.weights import load_adapter

MAX_ADAPTERS = 16  # loaded per base model; beyond that the least recently used one is evicted
UNKNOWN = "?"  # PEFT's active adapter may be any: set it before the next forward pass


class LoadedModel:
    """A base model in memory with its adapters.

    Created by ModelCache and used in the scheduler's thread only. Plain LoRA adapters run through
    multi_lora.py; all others run through PEFT's own layers, which switch to one adapter at a time
    or take `adapter_names`.

    Raises:
        ConfigError: the folder has no model that can be loaded.
    """

    def __init__(self, base: BaseRef) -> None:
        self.base = base
        self.device = resolve_device()
        self.tokenizer = load_tokenizer(base.folder)
        ensure_chat_template(self.tokenizer)
        self.model: Any = load_base(
            base.folder, get_fastest_dtype(self.device), self.device, quantized=base.quantized
        ).eval()
        eos_ids = self.model.generation_config.eos_token_id
        self.stop_ids: set[int] = {
            self.tokenizer.eos_token_id,
            *(eos_ids if isinstance(eos_ids, list) else [eos_ids]),
        } - {None}
        self.context_length: int = (
            getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or 2**31
        )
        self.accepts_position_ids = (
            "position_ids" in inspect.signature(self.model.forward).parameters
        )
        self.adapter_kind = ""
        self.adapter_names: OrderedDict[AdapterRef, str] = OrderedDict()
        self._active_adapter: AdapterRef | str | None = UNKNOWN
        self._row_adapters = RowAdapters()
        self._is_patched = False  # the LoRA layers follow `_row_adapters` and ignore PEFT's switch
        self.cache_bytes_per_token = 0  # measured at each prefill; 0 before the first
        self.is_broken = False  # loading an adapter failed half-way, so the layers are undefined

    @cached_property
    def reasoning_tags(self) -> tuple[str, str] | None:
        """The tags around reasoning in the model's chat template."""
        return find_reasoning_tags(self.tokenizer.get_chat_template())

    @cached_property
    def call_format(self) -> CallFormat | None:
        """How the model's chat template writes tool calls. None if it does not support them."""

        def render(messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> str:
            return render_messages(self.tokenizer, {"messages": messages, "tools": tools})

        try:
            return find_call_format(render, self.reasoning_tags)
        except TemplateTooSlow:
            raise
        except DataError:
            return None

    @cached_property
    def special_tokens(self) -> dict[int, str]:
        """The tokens that are no text, by ID."""
        added_tokens = self.tokenizer.added_tokens_decoder
        return {token_id: str(token) for token_id, token in added_tokens.items() if token.special}

    def is_compatible(self, adapter: AdapterRef | None) -> bool:
        """Whether this adapter can be used without unloading those of another type."""
        return adapter is None or not self.adapter_names or adapter.kind == self.adapter_kind

    @property
    def size_bytes(self) -> int:
        return sum(p.nbytes for p in self.model.parameters())

    @property
    def is_prompt_learning(self) -> bool:
        """Whether the adapters are prompts or prefixes, which come before the text."""
        return bool(self.adapter_names) and self.model.active_peft_config.is_prompt_learning

    @property
    def supports_mixed_batch(self) -> bool:
        """Whether rows with different adapters may share a batch. Most PEFT tuners ignore
        `adapter_names` (training/engine/modeling/library_patches.py).
        """
        return (
            not self.adapter_names
            or self.is_prompt_learning
            or self.adapter_kind in MIXED_BATCH_TUNERS
        )

    def ensure_adapter(self, adapter: AdapterRef | None, in_use: set[AdapterRef]) -> None:
        """Load this adapter if it is not loaded. Adapters `in_use` are not evicted."""
        if adapter is None:
            return
        if adapter not in self.adapter_names:
            self._load_adapter(adapter)
            self._evict_oldest(in_use)
        self.adapter_names.move_to_end(adapter)

    def run_prefill(
        self, ids: torch.Tensor, adapter: AdapterRef | None, *, all_logits: bool = False
    ) -> Any:
        """The forward pass over a prompt of shape (1, tokens). Returns PEFT's or the model's output
        with the logits of the last token (or of all) and the cache.
        """
        num_logits = 0 if all_logits else 1
        if self._is_patched:
            self._set_row_adapters([adapter])
        if self._is_patched or (self.is_prompt_learning and adapter is None):
            return self.model.get_base_model()(
                input_ids=ids, use_cache=True, logits_to_keep=num_logits
            )
        self._activate_adapter(adapter)
        return self.model(input_ids=ids, use_cache=True, logits_to_keep=num_logits)

    def run_decode(self, inputs: dict[str, Any], adapters: Sequence[AdapterRef | None]) -> Any:
        """A forward pass with one token per row, each through its own adapter. `inputs` are the
        arguments of a causal model.

        A soft prompt or prefix is in the cache since the prefill, so these rows go directly to the
        base model.
        """
        if self._is_patched:
            self._set_row_adapters(adapters)
        if self._is_patched or self.is_prompt_learning:
            return self.model.get_base_model()(**inputs)
        if len(set(adapters)) == 1:
            self._activate_adapter(adapters[0])
            return self.model(**inputs)
        if self._active_adapter in (None, UNKNOWN):
            self._activate_adapter(next(adapter for adapter in adapters if adapter is not None))
        names = [
            "__base__" if adapter is None else self.adapter_names[adapter] for adapter in adapters
        ]
        return self.model(**inputs, adapter_names=names)

    def _set_row_adapters(self, adapters: Sequence[AdapterRef | None]) -> None:
        self._row_adapters.set_names(
            tuple(None if adapter is None else self.adapter_names[adapter] for adapter in adapters)
        )

    def _activate_adapter(self, adapter: AdapterRef | None) -> None:
        """Switch PEFT's layers to an adapter, or off, unless they already are."""
        if not self.adapter_names or self._active_adapter == adapter:
            return
        if adapter is None:
            self.model.base_model.disable_adapter_layers()
        else:
            if not self.is_prompt_learning:
                self.model.base_model.enable_adapter_layers()
            self.model.set_adapter(self.adapter_names[adapter])
        self._active_adapter = adapter

    def _load_adapter(self, adapter: AdapterRef) -> None:
        name = f"adapter-{adapter.folder.name}-{adapter.sha256[:12]}"
        self.is_broken = True
        self._is_patched = False
        self._row_adapters.set_names(None)
        if self.adapter_names and adapter.kind == self.adapter_kind:
            self.model.load_adapter(adapter.folder, adapter_name=name)
        else:
            self.model = self._unwrap_base()
            self.adapter_names.clear()  # first, because loading may fail: none are attached now
            self.model = load_adapter(self.model, adapter.folder, name)
            self.adapter_kind = adapter.kind
        self.adapter_names[adapter] = name
        self._active_adapter = UNKNOWN
        self._is_patched = self.adapter_kind == "LORA" and patch_lora_layers(
            self.model, self._row_adapters
        )
        self.is_broken = False

    def _unwrap_base(self) -> Any:
        """The base model without PEFT's wrapper and layers."""
        if not self.adapter_names:
            return self.model
        return self.model.get_base_model() if self.is_prompt_learning else self.model.unload()

    def _evict_oldest(self, in_use: set[AdapterRef]) -> None:
        for adapter in list(self.adapter_names)[:-1]:
            if len(self.adapter_names) <= MAX_ADAPTERS:
                return
            if adapter not in in_use:
                self.model.delete_adapter(self.adapter_names.pop(adapter))
                self._active_adapter = UNKNOWN
