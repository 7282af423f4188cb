"""How similar the outputs of versions are: linear CKA of their last hidden states on the same
prompts. This compares methods that change no weight.

CKA (Kornblith et al. 2019, eq. 7 with linear kernels): ||Y'X||^2_F / (||X'X||_F ||Y'Y||_F), with
centered columns. 1 means equal up to rotation and scale.
"""

from __future__ import annotations

import gc
from itertools import combinations
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from training.engine.data.conversations import encode_prompt, ensure_chat_template, load_tokenizer
from training.engine.methods import METHODS
from training.engine.modeling.model import get_fastest_dtype, load_base
from training.engine.modeling.weights import load_adapter

CPU = torch.device("cpu")


class Member(Protocol):
    @property
    def key(self) -> str: ...
    @property
    def method(self) -> str: ...
    @property
    def base(self) -> Path: ...
    @property
    def folder(self) -> Path: ...


def compare_outputs(members: list[Any], prompts: list[list[dict[str, str]]]) -> dict[str, float]:
    """Linear CKA over all prompt tokens, for each pair `key,key` with the same base model."""
    states = {member.key: last_hidden_states(member, prompts) for member in members}
    return {
        f"{one.key},{other.key}": linear_cka(states[one.key], states[other.key])
        for one, other in combinations(members, 2)
        if one.base == other.base
    }


def last_hidden_states(member: Member, prompts: list[list[dict[str, str]]]) -> Tensor:
    """The input of the output layer, of shape (tokens of all prompts, hidden size)."""
    method = METHODS[member.method]
    folder = member.folder if method.is_full_finetuning else member.base
    tokenizer = load_tokenizer(folder)
    ensure_chat_template(tokenizer)
    model = load_base(folder, get_fastest_dtype(CPU), CPU, quantized=method.has_quantized_base)
    captured: list[Tensor] = []
    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(
        lambda _module, inputs: captured.append(inputs[0][0].float())
    )
    adapted_model = (
        model.eval() if method.is_full_finetuning else load_adapter(model, member.folder, "default")
    )
    prompt_states = []
    for messages in prompts:
        ids = encode_prompt(tokenizer, {"messages": messages})
        captured.clear()
        adapted_model(input_ids=torch.tensor([ids]), use_cache=member.method == "prefix")
        prompt_states.append(captured[-1][-len(ids) :])  # without virtual tokens
    hook.remove()
    del model, adapted_model
    gc.collect()
    return torch.cat(prompt_states)


def linear_cka(x: Tensor, y: Tensor) -> float:
    x, y = x - x.mean(0), y - y.mean(0)
    cross_norm = (y.T @ x).square().sum()
    self_norms = (x.T @ x).norm() * (y.T @ y).norm()
    return float(cross_norm / self_norms) if self_norms > 0 else 0.0
