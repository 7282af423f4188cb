"""The base model from a local folder of safetensors, and the loss at trained positions.

Nothing is downloaded, no code from the folder runs, and pickled weights are refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from training.engine.config import ConfigError, RunConfig
from training.engine.conversations import IGNORED


def pick_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pick_dtype(precision: str, device: torch.device) -> torch.dtype:
    """bf16 where `auto` finds it in hardware: 171 against 112 tokens/s for SmolLM2-135M on an AVX512-BF16 core.

    Without the instruction a CPU emulates bf16, slower than fp32.
    """
    if precision != "auto":
        return torch.bfloat16 if precision == "bf16" else torch.float32
    has = torch.cuda.is_bf16_supported() if device.type == "cuda" else torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if has else torch.float32


def load_base(folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """The causal language model in `dtype` on `device`, in eval mode.

    Raises:
        ConfigError: the folder holds no model that transformers can build from safetensors.
    """
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            attn_implementation="sdpa",
        )
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"The base model in {folder.name} cannot be loaded: {error}", field="model") from error
    return model.to(device)


def make_repeatable(config: RunConfig, device: torch.device) -> None:
    """Same data, config, seed and machine give the same bits: fixed threads, fixed kernels, seeded draws."""
    torch.set_num_threads(config.threads or torch.get_num_threads())
    torch.manual_seed(config.seed)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined] # a debugging aid, 6 % of a step
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = False


class TrainedPositions:
    """Lets any causal LM compute its logits only where a label is.

    The vocabulary projection is a quarter of SmolLM2-135M's multiplications, and its logits (4 bytes x 49,152 a token) most of a
    step's memory. A hook before the output layer keeps the hidden states of trained positions and drops the rest, so this
    holds for every architecture and for methods that put virtual tokens in front (positions count from the right).
    """

    def __init__(self, model: Any) -> None:
        self._keep: Tensor | None = None
        model.get_output_embeddings().register_forward_pre_hook(self._select)

    def _select(self, _module: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if self._keep is None:
            return None
        hidden = inputs[0]
        return (hidden[:, -self._keep.shape[1] :][self._keep], *inputs[1:])

    def refuse_leaks(self, model: Any, ids: Any) -> None:
        """Make sure that packed rows do not see each other: what stands before a row must not change what comes out of it.

        Raises:
            ConfigError: it does. (Seen with OPT, BioGPT, Qwen3-Next and GraniteMoeHybrid, which do not look at positions.)
        """
        row = torch.as_tensor(ids, device=next(model.parameters()).device)
        places = torch.arange(len(row), device=row.device)
        positions = torch.cat([places, places])[None]
        model.eval()
        with torch.no_grad():
            first, second = (
                model(input_ids=torch.cat([before, row])[None], position_ids=positions, use_cache=False).logits[0, len(row) :]
                for before in (row, row.roll(1).flip(0))
            )
        model.train()
        if (first - second).abs().max() > 1e-3 * first.abs().max():
            raise ConfigError("This model lets packed rows see each other; switch packing off.", field="packing")

    def loss_sum(self, model: Any, ids: Tensor, labels: Tensor, positions: Tensor | None = None) -> Tensor:
        """Sum of the cross entropy (nats) over all trained tokens of a batch; ids, labels and positions are (rows, tokens).

        Padding stands on the right, where no trained position can see it: with no attention mask at all, attention keeps its
        fast causal kernel and no (tokens x tokens) mask is built.
        """
        self._keep = torch.zeros_like(labels, dtype=torch.bool)
        self._keep[:, :-1] = labels[:, 1:] != IGNORED
        try:
            logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        finally:
            keep, self._keep = self._keep, None
        targets = labels[:, 1:][keep[:, :-1]]
        return functional.cross_entropy(logits.float(), targets, reduction="sum")
