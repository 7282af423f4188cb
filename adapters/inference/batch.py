"""A batch of sequences that decode together, one token each per forward pass. No queue and no HTTP.

A sequence joins after its own prefill and leaves when it is finished. In the shared KV cache each
row's entries are on the right and padding is on the left, hidden by the attention mask. Every row
has its own position ids.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from adapters.inference.answer_format import ParsedAnswer
from adapters.inference.loaded_model import LoadedModel
from adapters.inference.types import GenerationRequest


@dataclass
class ActiveSequence:
    """A request that is being answered, one row of a batch.

    `token` is the newest token, which the model has not processed yet. `cache_length` counts the
    row's own entries in the KV cache. `ids` are the generated tokens; `sent` is what has been sent
    of their text. `dropped_ids` are the special tokens that the text leaves out.
    """

    request: GenerationRequest
    prompt_tokens: int
    max_tokens: int
    generator: torch.Generator
    token: int = 0
    cache_length: int = 0
    ids: list[int] = field(default_factory=list)
    dropped_ids: frozenset[int] = frozenset()
    sent: ParsedAnswer = field(default_factory=ParsedAnswer)
    started_at: float = field(default_factory=time.monotonic)


class Batch:
    """Sequences of one base model. They use different adapters only where
    `LoadedModel.supports_mixed_batch`.
    """

    def __init__(self) -> None:
        self.sequences: list[ActiveSequence] = []
        self.cache: Any = None
        # (rows, width), 1 where a row has an entry. None: every row is as long as the cache.
        self.mask: Tensor | None = None

    def can_join(self, cache: Any) -> bool:
        """Whether a sequence with this cache can join. It cannot if a layer drops entries (sliding
        windows) or keeps a state: left padding cannot be masked there.
        """
        return not self.sequences or (is_full_cache(cache) and is_full_cache(self.cache))

    def add_sequence(self, sequence: ActiveSequence, cache: Any) -> None:
        sequence.cache_length = cache.get_seq_length()
        if self.sequences:
            width = max(sequence.cache_length, self.cache.get_seq_length())
            lengths = torch.tensor(
                [*(member.cache_length for member in self.sequences), sequence.cache_length],
                device=cache.layers[0].keys.device,
            )
            for mine, other in zip(self.cache.layers, cache.layers, strict=True):
                mine.keys = torch.cat([pad_cache(mine.keys, width), pad_cache(other.keys, width)])
                mine.values = torch.cat(
                    [pad_cache(mine.values, width), pad_cache(other.values, width)]
                )
            self.mask = build_attention_mask(lengths, width)
        else:
            self.cache = cache
        self.sequences.append(sequence)

    def remove_sequences(self, finished: list[ActiveSequence]) -> None:
        remaining = [
            index for index, sequence in enumerate(self.sequences) if sequence not in finished
        ]
        self.sequences = [self.sequences[index] for index in remaining]
        if not remaining:
            self.cache = self.mask = None
            return
        width = max(sequence.cache_length for sequence in self.sequences)
        indices = torch.tensor(remaining, device=self.cache.layers[0].keys.device)
        self.cache.batch_select_indices(indices)
        if self.mask is None:
            return
        for layer in self.cache.layers:
            layer.keys, layer.values = layer.keys[..., -width:, :], layer.values[..., -width:, :]
        self.mask = build_attention_mask(
            torch.tensor(
                [sequence.cache_length for sequence in self.sequences], device=indices.device
            ),
            width,
        )

    def decode_step(self, loaded_model: LoadedModel) -> Tensor:
        """One forward pass with each row's newest token. Returns the logits of the next tokens, of
        shape (rows, vocabulary).
        """
        device = loaded_model.device
        ids = torch.tensor([[sequence.token] for sequence in self.sequences], device=device)
        inputs: dict[str, Any] = {"input_ids": ids, "cache": self.cache, "use_cache": True}
        if self.mask is not None:
            self.mask = functional.pad(self.mask, (0, 1), value=1)
            inputs["attention_mask"] = self.mask
        # Without them, a model computes one row of positions for the whole batch.
        if self.mask is not None or loaded_model.accepts_position_ids:
            inputs["position_ids"] = torch.tensor(
                [[sequence.cache_length] for sequence in self.sequences], device=device
            )
        logits = loaded_model.run_decode(
            inputs, [sequence.request.adapter for sequence in self.sequences]
        ).logits
        for sequence in self.sequences:
            sequence.cache_length += 1
        return logits[:, -1]  # type: ignore[no-any-return]


def is_full_cache(cache: Any) -> bool:
    """Whether every layer keeps the keys and values of all tokens."""
    from transformers.cache_utils import DynamicLayer

    return all(type(layer) is DynamicLayer for layer in cache.layers)


def count_cache_bytes(cache: Any) -> int:
    """Bytes of the keys and values. Layers with another kind of state count as 0."""
    tensors = (getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values"))
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))


def pad_cache(entries: Tensor, width: int) -> Tensor:
    """Pad (rows, heads, entries, head size) with zeros on the left to `width` entries."""
    return functional.pad(entries, (0, 0, width - entries.shape[-2], 0))


def build_attention_mask(lengths: Tensor, width: int) -> Tensor | None:
    """The mask of shape (rows, width) for rows with this many entries. None if all are full."""
    if bool((lengths == width).all()):
        return None
    return (torch.arange(width, device=lengths.device) >= width - lengths[:, None]).long()
