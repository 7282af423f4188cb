"""Loads the base model from a local folder of safetensors and computes the loss at labeled
positions.

Nothing is downloaded, no code from the folder runs, and pickled weights are rejected.
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
from training.engine.modeling.host_errors import is_host_error
from training.engine.modeling.library_patches import disable_repacking
from training.engine.modeling.short_attention import use_short_attention
from training.errors import ConfigError


def resolve_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def limit_memory_fraction(device: torch.device) -> None:
    """Limit the CUDA allocator to the memory reserved for this run, SNAPML_DEVICE_BYTES, if it
    shares the device with other runs.
    """
    limit_bytes = os.environ.get("SNAPML_DEVICE_BYTES")
    if limit_bytes and device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, int(limit_bytes) / total), device)


def resolve_precision(config: RunConfig, device: torch.device) -> str:
    """Return the precision of a run. `auto` is bf16 if the hardware supports it: 171 instead of 112
    tokens/s for SmolLM2-135M on an AVX512-BF16 core.

    Without the instruction, a CPU emulates bf16 and is slower than with fp32. Full fine-tuning uses
    `mixed`: bf16 has an 8-bit mantissa, so a weight of 1 does not change by updates under 0.004,
    and those of full fine-tuning are 100 times smaller.
    """
    return choose_precision(config, has_bf16=get_fastest_dtype(device) is torch.bfloat16)


def choose_precision(config: RunConfig, *, has_bf16: bool) -> str:
    """Like `resolve_precision`, for hardware that is not in this machine."""
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
    """Precision `mixed`: weights stay in fp32, and every forward of this model (training,
    evaluation, generation) runs under bf16 autocast.
    """
    model.forward = torch.autocast(device.type, dtype=torch.bfloat16)(model.forward)


def load_base(
    folder: Path, dtype: torch.dtype, device: torch.device, *, quantized: bool = False
) -> Any:
    """Load the causal language model in `dtype` on `device`, in eval mode, with its linear layers
    in NF4 if `quantized`.

    Raises:
        ConfigError: transformers cannot load a model from the folder's safetensors.
        OSError, RuntimeError: of the machine (host_errors.py).
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
        if is_host_error(error):
            raise
        raise ConfigError(
            f"The base model in {folder.name} cannot be loaded: {error}", field="model"
        ) from error
    return disable_repacking(model) if quantized else model.to(device)


def build_nf4_config(dtype: torch.dtype) -> Any:
    """NF4 with double quantization (Dettmers et al. 2023): about 4.13 bits per weight. Matrix
    products are computed in `dtype`.
    """
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def wrap_base_model(base: Any, config: RunConfig) -> Any:
    """Wrap the base for the method of this config, and enable gradient checkpointing if it is
    set.
    """
    if config.gradient_checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model = METHODS[config.method].wrap_model(base, config)
    # The saved adapter has the model's name, not a path of this server
    for peft_config in getattr(model, "peft_config", {}).values():
        peft_config.base_model_name_or_path = config.model_name or Path(config.model).name
    return model


def count_parameters(model: Any) -> int:
    """Count the parameters of the model, also of 4-bit weights, of which two share a byte."""
    return sum(
        math.prod(p.quant_state.shape) if hasattr(p, "quant_state") else p.numel()
        for p in model.parameters()
    )


def set_deterministic(config: RunConfig, device: torch.device) -> None:
    """Make training bit-identical for the same data, config, seed and machine: fixed number of
    threads, deterministic kernels, seeded random numbers.
    """
    torch.set_num_threads(config.threads or torch.get_num_threads())
    torch.manual_seed(config.seed)
    torch.use_deterministic_algorithms(True)
    # A debugging aid that takes 6% of a step
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = False


class LabeledPositionsHead:
    """Makes a causal LM compute logits only at positions with a label.

    The vocabulary projection is a quarter of SmolLM2-135M's multiplications, and its logits (4
    bytes x 49,152 per token) are most of a step's memory. A hook before the output layer selects
    the hidden states of labeled positions. So this works for every architecture, and for methods
    with virtual tokens in front, since positions are counted from the right.
    """

    def __init__(self, model: Any) -> None:
        # Indices into rows x tokens, and the number of tokens per row; None selects all positions
        self._selection: tuple[Tensor, int] | None = None
        self._hook = model.get_output_embeddings().register_forward_pre_hook(self._select_labeled)

    def remove_hook(self) -> None:
        """Remove the hook, before another head is created for the same model."""
        self._hook.remove()

    def _select_labeled(
        self, _module: Any, inputs: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...] | None:
        if self._selection is None:
            return None
        indices, length = self._selection
        return (inputs[0][:, -length:].flatten(0, 1).index_select(0, indices), *inputs[1:])

    def check_packing_isolation(self, model: Any, ids: Any) -> None:
        """Check that packed rows do not attend to each other: the logits of a row must not depend
        on the row in front of it.

        Raises:
            ConfigError: they do. OPT, BioGPT, Qwen3-Next and GraniteMoeHybrid, for example, ignore
                position_ids.
        """
        row = torch.as_tensor(ids, device=next(model.parameters()).device)
        offsets = torch.arange(len(row), device=row.device)
        positions = torch.cat([offsets, offsets])[None]
        other_row = torch.where(row > 0, row - 1, row + 1)  # differs in every token
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
                "Packing does not work with this model: packed rows attend to each other. Turn "
                "packing off.",
                field="packing",
            )

    def compute_loss_sum(
        self, model: Any, ids: Tensor, labels: Tensor, positions: Tensor | None = None
    ) -> Tensor:
        """Return the sum of the cross entropy (nats) over all labels of a batch. ids, labels and
        positions have the shape (rows, tokens).

        Padding is on the right, where causal attention hides it from all labeled positions. So
        there is no attention mask: attention can use its fast causal kernel, and no
        (tokens x tokens) mask is built.
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
        """Like `compute_loss_sum`. `targets` are the labels, and `indices` (into rows x tokens) the
        positions before them.
        """
        self._selection = (indices, ids.shape[1])
        try:
            logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        finally:
            self._selection = None
        return functional.cross_entropy(logits.float(), targets, reduction="sum")
