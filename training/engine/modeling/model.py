"""The base model from a local folder of safetensors, and the loss at trained positions.

Nothing is downloaded, no code from the folder runs, and pickled weights are refused.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from training.engine.config import RunConfig
from training.engine.data.conversations import IGNORE_INDEX
from training.engine.methods import METHODS
from training.engine.modeling.library_patches import patch_repacking
from training.engine.modeling.short_attention import use_short_attention
from training.errors import ConfigError


def resolve_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def limit_memory_fraction(device: torch.device) -> None:
    """Where other runs use this device, too, the allocator ends at what this one reserved:
    SNAPML_DEVICE_BYTES.
    """
    limit_bytes = os.environ.get("SNAPML_DEVICE_BYTES")
    if limit_bytes and device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, int(limit_bytes) / total), device)


def resolve_precision(config: RunConfig, device: torch.device) -> str:
    """bf16 where `auto` finds it in hardware: 171 against 112 tokens/s for SmolLM2-135M on an
    AVX512-BF16 core.

    Without the instruction a CPU emulates bf16, slower than fp32. A whole model is trained in
    `mixed`: bf16 has 8 bits of mantissa, so a weight of 1 does not move by steps under 0.004, and
    full fine-tuning's are 100 times smaller.
    """
    return choose_precision(config, has_bf16=get_fastest_dtype(device) is torch.bfloat16)


def choose_precision(config: RunConfig, *, has_bf16: bool) -> str:
    """The same for hardware that is not at hand."""
    if config.precision != "auto":
        return config.precision
    if not has_bf16:
        return "fp32"
    return "mixed" if METHODS[config.method].is_full_finetuning else "bf16"


def get_fastest_dtype(device: torch.device) -> torch.dtype:
    is_supported = (
        torch.cuda.is_bf16_supported()
        if device.type == "cuda"
        else torch.cpu._is_avx512_bf16_supported()
    )
    return torch.bfloat16 if is_supported else torch.float32


def get_weights_dtype(precision: str) -> torch.dtype:
    return torch.bfloat16 if precision == "bf16" else torch.float32


def compute_in_bf16(model: Any, device: torch.device) -> None:
    """`mixed`: weights stay fp32, and every forward of this model (training, measuring, answering)
    multiplies in bf16.
    """
    model.forward = torch.autocast(device.type, dtype=torch.bfloat16)(model.forward)


def load_base(
    folder: Path, dtype: torch.dtype, device: torch.device, *, quantized: bool = False
) -> Any:
    """The causal language model in `dtype` on `device`, in eval mode; its linear layers in NF4 if
    `quantised`.

    Raises:
        ConfigError: the folder holds no model that transformers can build from safetensors.
    """
    from transformers import AutoModelForCausalLM

    if device.type == "cpu":
        use_short_attention()
    quantization = (
        {"quantization_config": build_nf4_config(dtype), "device_map": {"": device}}
        if quantized
        else {}
    )
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            attn_implementation="sdpa",
            **quantization,
        )
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"The base model in {folder.name} cannot be loaded: {error}", field="model"
        ) from error
    return patch_repacking(model) if quantized else model.to(device)


def build_nf4_config(dtype: torch.dtype) -> Any:
    """NF4 with double quantisation (Dettmers et al. 2023): about 4.13 bits a weight. Products are
    computed in `dtype`.
    """
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def wrap_base_model(base: Any, config: RunConfig) -> Any:
    """The base as the technique trains it, with gradient checkpointing if that is asked for."""
    if config.gradient_checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model = METHODS[config.method].wrap_model(base, config)
    for peft_config in getattr(
        model, "peft_config", {}
    ).values():  # a name, not a path of this server
        peft_config.base_model_name_or_path = config.model_name or Path(config.model).name
    return model


def count_parameters(model: Any) -> int:
    """Parameters as the model has them, also where two of them share a byte."""
    return sum(
        math.prod(p.quant_state.shape) if hasattr(p, "quant_state") else p.numel()
        for p in model.parameters()
    )


def set_deterministic(config: RunConfig, device: torch.device) -> None:
    """Same data, config, seed and machine give the same bits: fixed threads, fixed kernels, seeded
    draws.
    """
    torch.set_num_threads(config.threads or torch.get_num_threads())
    torch.manual_seed(config.seed)
    torch.use_deterministic_algorithms(True)
    # a debugging aid, 6 % of a step
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = False


class LabeledPositionsHead:
    """Lets any causal LM compute its logits only where a label is.

    The vocabulary projection is a quarter of SmolLM2-135M's multiplications, and its logits (4
    bytes x 49,152 a token) most of a step's memory. A hook before the output layer keeps the hidden
    states of trained positions and drops the rest, so this holds for every architecture and for
    methods that put virtual tokens in front (positions count from the right).
    """

    def __init__(self, model: Any) -> None:
        self._selection: tuple[Tensor, int] | None = None  # places among rows x tokens, and tokens
        self._hook = model.get_output_embeddings().register_forward_pre_hook(self._select)

    def remove_hook(self) -> None:
        """Take the hook out of the model, which another head is to use."""
        self._hook.remove()

    def _select(self, _module: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if self._selection is None:
            return None
        indices, length = self._selection
        return (inputs[0][:, -length:].flatten(0, 1).index_select(0, indices), *inputs[1:])

    def check_packing_isolation(self, model: Any, ids: Any) -> None:
        """Make sure that packed rows do not see each other: what stands before a row must not
        change what comes out of it.

        Raises:
            ConfigError: it does. (Seen with OPT, BioGPT, Qwen3-Next and GraniteMoeHybrid, which do
                not look at positions.)
        """
        row = torch.as_tensor(ids, device=next(model.parameters()).device)
        offsets = torch.arange(len(row), device=row.device)
        positions = torch.cat([offsets, offsets])[None]
        other_row = torch.where(row > 0, row - 1, row + 1)  # not one token the same
        model.eval()
        with torch.no_grad():
            first, second = (
                model(
                    input_ids=torch.cat([first_row, row])[None],
                    position_ids=positions,
                    use_cache=False,
                ).logits[0, len(row) :]
                for first_row in (row, other_row)
            )
        model.train()
        if (first - second).abs().max() > 1e-3 * first.abs().max():
            raise ConfigError(
                "This model lets packed rows see each other; switch packing off.", field="packing"
            )

    def compute_loss_sum(
        self, model: Any, ids: Tensor, labels: Tensor, positions: Tensor | None = None
    ) -> Tensor:
        """Sum of the cross entropy (nats) over all trained tokens of a batch; ids, labels and
        positions are (rows, tokens).

        Padding stands on the right, where no trained position can see it: with no attention mask at
        all, attention keeps its fast causal kernel and no (tokens x tokens) mask is built.
        """
        has_loss = torch.zeros_like(labels, dtype=torch.bool)
        has_loss[:, :-1] = labels[:, 1:] != IGNORE_INDEX
        indices = has_loss.flatten().nonzero().squeeze(1)
        return self.compute_loss_at_positions(
            model, ids, indices, labels[:, 1:][has_loss[:, :-1]], positions
        )

    def compute_loss_at_positions(
        self, model: Any, ids: Tensor, indices: Tensor, targets: Tensor, positions: Tensor | None
    ) -> Tensor:
        """The same from the places (numbers among rows x tokens) whose next token is trained, and
        those tokens.
        """
        self._selection = (indices, ids.shape[1])
        try:
            logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        finally:
            self._selection = None
        return functional.cross_entropy(logits.float(), targets, reduction="sum")
