"""A complete training step on fake tensors: the model, method, loss and optimizer of a run, without
weights.

Shallow models are enough. Without padding, the memory of each phase of a step is affine in layers,
batch, length, trained positions and the method's size (training/engine/memory_estimator.py), so a
few simulated steps determine the estimator.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from training.engine.config import RunConfig
from training.engine.memory_estimator import BatchShape
from training.engine.methods import METHODS
from training.engine.modeling.model import (
    LabeledPositionsHead,
    compute_in_bf16,
    get_weights_dtype,
    wrap_base_model,
)
from training.engine.modeling.optimizers import make_optimizer
from training.engine.simulation.fake_bnb import (
    count_8bit_state_bytes,
    count_8bit_workspace_bytes,
    replace_with_4bit_layers,
)
from training.engine.simulation.storage_tracker import StorageTracker


def convert_to_fake(model: nn.Module) -> None:
    """Replace every parameter and buffer of a model on `meta` by a fake CPU tensor. Tied tensors
    stay tied.
    """
    fakes: dict[int, Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in fakes:
                    fake: Tensor = torch.empty(tensor.shape, dtype=tensor.dtype)
                    if isinstance(tensor, nn.Parameter):
                        fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
                    fakes[id(tensor)] = fake
                tensors[name] = fakes[id(tensor)]  # type: ignore[assignment]


class SimulatedStep:
    """A wrapped fake model of `layers` layers. `run_step(shape)` returns the live bytes after every
    operator of a training step.

    Hooks on layers, logits and gradients tell the StorageTracker which phase the step is in. The
    fake tensor mode is active from construction until `close`, which the creator must call.
    """

    def __init__(
        self, model_config: Any, config: RunConfig, *, layers: int, precision: str, device: str
    ) -> None:
        from transformers import AttentionInterface, AutoModelForCausalLM

        self.config = config
        if device == "cuda":
            model_config = without_attention_dropout(model_config)
        dtype = get_weights_dtype(precision)
        with torch.device("meta"):
            base = AutoModelForCausalLM.from_config(
                with_layers(model_config, layers), dtype=dtype, attn_implementation="sdpa"
            )
            self.largest_parameter = max(p.numel() for p in base.parameters())
            if METHODS[config.method].has_quantized_base:
                replace_with_4bit_layers(base, dtype)
            self.model = wrap_base_model(base, config)
        self.contexts = ExitStack()
        self.tracker = StorageTracker(device)
        self.contexts.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        self.contexts.enter_context(self.tracker)
        self.contexts.enter_context(patch_packing_detection(is_packed=config.packing))
        self.contexts.enter_context(
            mock.patch.dict(AttentionInterface._global_mapping, {"sdpa": self.compute_attention})
        )
        self.current_block = ""
        convert_to_fake(self.model)
        if precision == "mixed":
            compute_in_bf16(self.model, torch.device("cpu"))
        trained_parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.num_trainable = sum(p.numel() for p in trained_parameters)
        for parameter in trained_parameters:
            parameter.register_post_accumulate_grad_hook(
                lambda p: self.tracker.relabel_tensors([p.grad], "gradients")
            )
        self.head = LabeledPositionsHead(self.model)
        output = self.model.get_output_embeddings()
        output.register_forward_pre_hook(
            lambda *_: self.tracker.enter_phase(self.phase_name("head"), "logits")
        )
        output.register_forward_hook(
            lambda _m, _a, out: self.hook_gradient(out, "backward projection")
        )
        self.hook_layers(layers)
        self.optimizer_kind = "adamw_torch" if config.optim in ("auto", "adamw_torch") else "8bit"
        self.is_eval, self.is_forward = False, True
        self.optimizer = (
            make_optimizer(self.model, config, torch.device("cpu"))
            if self.optimizer_kind == "adamw_torch"
            else None
        )
        self.init_optimizer_state(trained_parameters)

    def phase_name(self, phase: str) -> str:
        return f"eval {phase}" if self.is_eval else phase

    def enter_forward_phase(self, phase: str) -> None:
        """Enter a forward phase, unless gradient checkpointing is recomputing the layer in the
        backward pass.
        """
        if self.is_forward:
            self.tracker.enter_phase(self.phase_name(f"forward {phase}"), "activations")

    def hook_layers(self, layers: int) -> None:
        """Hook the layers so that the backward pass has the phases loss, projection, top layer,
        layers between, bottom layer, embeddings.
        """
        blocks = next(
            m for m in self.model.modules() if isinstance(m, nn.ModuleList) and len(m) == layers
        )
        names = {layers - 1: "top", 0: "bottom"}
        for index, block in enumerate(blocks):
            name = names.get(index, "between")
            block.register_forward_pre_hook(lambda *_, name=name: self.enter_forward_phase(name))
            block.register_forward_pre_hook(
                lambda *_, name=name: setattr(self, "current_block", name)
            )
            block.register_forward_hook(
                lambda _m, _a, out, name=name: self.hook_gradient(out, f"backward {name}")
            )
        self.model.get_input_embeddings().register_forward_hook(
            lambda _m, _a, out: self.hook_gradient(out, "backward embeddings")
        )

    def compute_attention(self, module: Any, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Attention with torch's kernel, even where a run uses short_attention.py. Its backward
        pass is a phase of its own; memory_estimator.count_attention_bytes adds the difference.
        """
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        out, weights = sdpa_attention_forward(module, query, *args, **kwargs)
        self.hook_gradient(out, f"backward {self.current_block} attention")
        self.hook_gradient(query, f"backward {self.current_block} below")
        return out, weights

    def hook_gradient(self, out: Any, phase: str) -> None:
        tensor = out[0] if isinstance(out, tuple) else out
        if tensor.requires_grad:
            tensor.register_hook(lambda _grad: self.tracker.enter_phase(phase, "temporary"))

    def init_optimizer_state(self, trained_parameters: list[nn.Parameter]) -> None:
        """Create the optimizer's state as it is from the second step on."""
        if self.optimizer is None:
            self.optimizer_state = [
                torch.empty(count_8bit_state_bytes(p.numel()), dtype=torch.uint8)
                for p in trained_parameters
            ]
            self.tracker.relabel_tensors(self.optimizer_state, "optimizer")
            return
        for parameter in trained_parameters:
            parameter.grad = torch.empty_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for parameter in trained_parameters:
            self.tracker.relabel_tensors(self.optimizer.state[parameter].values(), "optimizer")

    def run_step(self, shape: BatchShape) -> dict[str, list[tuple[int, ...]]]:
        """Run a training step and an evaluation of a batch of this shape. Returns, for each phase,
        bytes by kind after every operator. Phases of the evaluation start with `eval`.
        """
        self.tracker.reset_snapshots()
        ids = torch.zeros(shape.rows, shape.length, dtype=torch.long)
        labels = FixedLabels(shape)
        for _ in range(2 if self.config.accumulates_gradients else 1):
            self.tracker.enter_phase("forward", "activations")
            self.model.train()
            loss = self.compute_loss(ids, labels)
            self.is_forward = False
            self.tracker.enter_phase("backward loss", "logits")
            loss.backward()  # type: ignore[no-untyped-call]
            self.is_forward = True
            del loss
        self.tracker.enter_phase("optimizer", "temporary")
        trained_parameters = [p for p in self.model.parameters() if p.requires_grad]
        torch.nn.utils.clip_grad_norm_(trained_parameters, 1.0, error_if_nonfinite=False)
        if self.optimizer is not None:
            self.optimizer.step()
        elif self.tracker.device == "cpu":  # On CUDA one kernel works in place
            for parameter in trained_parameters:
                torch.empty(count_8bit_workspace_bytes(parameter), dtype=torch.uint8)
        for parameter in trained_parameters:
            parameter.grad = None
        self.is_eval = True
        self.tracker.enter_phase("eval forward", "activations")
        self.model.eval()
        with torch.no_grad():
            self.compute_loss(ids, labels)
        self.is_eval = False
        return self.tracker.snapshots

    def compute_loss(self, ids: Tensor, labels: FixedLabels) -> Tensor:
        positions = torch.zeros_like(ids) if self.config.packing else None
        return self.head.compute_loss_at_positions(
            self.model, ids, labels.positions, labels.targets, positions
        )

    def close(self) -> None:
        self.contexts.close()


class FixedLabels:
    """Labels of a fake batch. Only the number of trained positions matters, because fake tensors
    have no values.
    """

    def __init__(self, shape: BatchShape) -> None:
        self.positions = torch.zeros(shape.trained_tokens, dtype=torch.long)
        self.targets = torch.zeros(shape.trained_tokens, dtype=torch.long)


def with_layers(model_config: Any, layers: int) -> Any:
    """A copy of the model's config with fewer layers. If it lists layer types, the first ones are
    kept.
    """
    reduced = copy.deepcopy(model_config)
    text_config = reduced.get_text_config()
    name = "num_hidden_layers" if hasattr(text_config, "num_hidden_layers") else "n_layer"
    setattr(text_config, name, layers)
    if getattr(text_config, "layer_types", None):
        text_config.layer_types = text_config.layer_types[:layers]
    return reduced


def without_attention_dropout(model_config: Any) -> Any:
    """A copy of the model's config without attention dropout.

    CUDA's attention kernels apply dropout without storing a mask. The CPU kernel that is simulated
    would store a matrix of all token pairs.
    """
    changed = copy.deepcopy(model_config)
    for config in (changed, changed.get_text_config()):
        for name in ("attention_dropout", "attn_pdrop"):
            if hasattr(config, name):
                setattr(config, name, 0.0)
    return changed


@contextmanager
def patch_packing_detection(*, is_packed: bool) -> Iterator[None]:
    """Replace transformers' detection of packed rows, which reads the values of position ids: fake
    tensors have no values.
    """

    def fake_detection(position_ids: Tensor) -> Tensor | None:
        return torch.zeros_like(position_ids) if is_packed else None

    with mock.patch("transformers.masking_utils.find_packed_sequence_indices", fake_detection):
        yield


def load_model_config(folder: Path) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
