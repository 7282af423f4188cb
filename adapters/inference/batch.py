"""Answers under way that share a forward: one token each, whatever their lengths. It knows no queue
and no HTTP.

Rows join after a first forward of their own and leave when they have ended. A joined cache has its
rows' entries on the right and padding on the left, which a mask hides; every row keeps counting its
own positions.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from adapters.inference.loaded_model import Held
from adapters.inference.types import Question


@dataclass
class Answer:
    """A question under way. `seen` entries of the cache are its own; `token` is the one that the
    model has not seen yet.
    """

    question: Question
    prompt_tokens: int
    most_tokens: int
    draw: torch.Generator
    token: int = 0
    seen: int = 0
    ids: list[int] = field(default_factory=list)
    sent: int = 0  # characters
    began: float = field(default_factory=time.monotonic)


class Batch:
    """Rows of one base. `adapters` of several names are among them only where `Held.mixes`."""

    def __init__(self) -> None:
        self.answers: list[Answer] = []
        self.cache: Any = None
        self.mask: Tensor | None = (
            # (rows, width), 1 where a row has an entry; None: all rows are as long as the cache
            None
        )

    def takes(self, cache: Any) -> bool:
        """Can a row with this cache join? Layers that forget (sliding windows, states) are told
        apart by no mask.
        """
        return not self.answers or (plain(cache) and plain(self.cache))

    def join(self, answer: Answer, cache: Any) -> None:
        answer.seen = cache.get_seq_length()
        if self.answers:
            width = max(answer.seen, self.cache.get_seq_length())
            rows = torch.tensor(
                [*(one.seen for one in self.answers), answer.seen],
                device=cache.layers[0].keys.device,
            )
            for mine, other in zip(self.cache.layers, cache.layers, strict=True):
                mine.keys = torch.cat([widened(mine.keys, width), widened(other.keys, width)])
                mine.values = torch.cat([widened(mine.values, width), widened(other.values, width)])
            self.mask = mask_of(rows, width)
        else:
            self.cache = cache
        self.answers.append(answer)

    def leave(self, gone: list[Answer]) -> None:
        stay = [place for place, answer in enumerate(self.answers) if answer not in gone]
        self.answers = [self.answers[place] for place in stay]
        if not stay:
            self.cache = self.mask = None
            return
        width = max(answer.seen for answer in self.answers)
        places = torch.tensor(stay, device=self.cache.layers[0].keys.device)
        self.cache.batch_select_indices(places)
        if self.mask is None:
            return
        for layer in self.cache.layers:
            layer.keys, layer.values = layer.keys[..., -width:, :], layer.values[..., -width:, :]
        self.mask = mask_of(
            torch.tensor([answer.seen for answer in self.answers], device=places.device), width
        )

    def step(self, held: Held) -> Tensor:
        """Show every row its newest token; returns the logits of the next, (rows, vocabulary)."""
        device = held.device
        ids = torch.tensor([[answer.token] for answer in self.answers], device=device)
        given: dict[str, Any] = {"input_ids": ids, "cache": self.cache, "use_cache": True}
        if self.mask is not None:
            self.mask = functional.pad(self.mask, (0, 1), value=1)
            given["attention_mask"] = self.mask
        # Else a model makes one row of them for all
        if self.mask is not None or held.takes_positions:
            given["position_ids"] = torch.tensor(
                [[answer.seen] for answer in self.answers], device=device
            )
        logits = held.next(given, [answer.question.adapter for answer in self.answers]).logits
        for answer in self.answers:
            answer.seen += 1
        return logits[:, -1]  # type: ignore[no-any-return]


def plain(cache: Any) -> bool:
    """Does every layer keep all of its entries?"""
    from transformers.cache_utils import DynamicLayer

    return all(type(layer) is DynamicLayer for layer in cache.layers)


def bytes_of(cache: Any) -> int:
    """Of its keys and values; a layer that keeps other states counts for none."""
    tensors = (getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values"))
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))


def widened(entries: Tensor, width: int) -> Tensor:
    """(rows, heads, entries, size) with zeros on the left up to `width` entries."""
    return functional.pad(entries, (0, 0, width - entries.shape[-2], 0))


def mask_of(rows: Tensor, width: int) -> Tensor | None:
    """(rows, width) from the number of entries of each row; None where nothing has to be hidden."""
    if bool((rows == width).all()):
        return None
    return (torch.arange(width, device=rows.device) >= width - rows[:, None]).long()
