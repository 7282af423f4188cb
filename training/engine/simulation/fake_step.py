"""One true training step on fake tensors: the model, technique, loss and optimizer that a run uses,
without weights.

Shallow models suffice: without padding every stretch of a step is affine in layers, batch, length,
trained positions and the technique's size (training/engine/memory_estimator.py), so a few of them
tell the whole.
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
from training.engine.modeling.model import LabeledPositionsHead, compute_in_bf16, get_weights_dtype, wrap_base_model
from training.engine.modeling.optimizers import make_optimizer
from training.engine.simulation.fake_bnb import bytes_8bit, four_bit_layers, widened_8bit
from training.engine.simulation.storage_tracker import Storages


def make_fake(model: nn.Module) -> None:
    """Every parameter and buffer of a model on `meta` becomes a fake CPU tensor; what was tied
    stays tied.
    """
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    fake: Tensor = torch.empty(tensor.shape, dtype=tensor.dtype)
                    if isinstance(tensor, nn.Parameter):
                        fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
                    made[id(tensor)] = fake
                held[name] = made[id(tensor)]  # type: ignore[assignment]


class FakeRun:
    """A model of `layers` layers, wrapped and ready; `step(shape)` tells what is alive at every
    moment of a step.
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
            self.largest = max(p.numel() for p in base.parameters())
            if METHODS[config.method].has_quantized_base:
                four_bit_layers(base, dtype)
            self.model = wrap_base_model(base, config)
        self.modes = ExitStack()
        self.storages = Storages(device)
        self.modes.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        self.modes.enter_context(self.storages)
        self.modes.enter_context(packed_or_not(packed=config.packing))
        self.modes.enter_context(
            mock.patch.dict(AttentionInterface._global_mapping, {"sdpa": self.attend})
        )
        self.block = ""
        make_fake(self.model)
        if precision == "mixed":
            compute_in_bf16(self.model, torch.device("cpu"))
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.trainable = sum(p.numel() for p in trained)
        for parameter in trained:
            parameter.register_post_accumulate_grad_hook(
                lambda p: self.storages.call([p.grad], "gradients")
            )
        self.head = LabeledPositionsHead(self.model)
        output = self.model.get_output_embeddings()
        output.register_forward_pre_hook(
            lambda *_: self.storages.enter(self.mark("head"), "logits")
        )
        output.register_forward_hook(
            lambda _m, _a, out: self.mark_gradient(out, "backward projection")
        )
        self.watch_layers(layers)
        self.kind_of_optimizer = "adamw_torch" if config.optim in ("auto", "adamw_torch") else "8bit"
        self.measuring, self.forward = False, True
        self.optimizer = (
            make_optimizer(self.model, config, torch.device("cpu"))
            if self.kind_of_optimizer == "adamw_torch"
            else None
        )
        self.begin_optimizer(trained)

    def mark(self, stretch: str) -> str:
        return f"eval {stretch}" if self.measuring else stretch

    def enter_forward(self, stretch: str) -> None:
        """Not when gradient checkpointing computes a layer again on the way back."""
        if self.forward:
            self.storages.enter(self.mark(f"forward {stretch}"), "activations")

    def watch_layers(self, layers: int) -> None:
        """Backward goes through the stretches loss, projection, top layer, layers between, bottom
        layer, embeddings.
        """
        blocks = next(
            m for m in self.model.modules() if isinstance(m, nn.ModuleList) and len(m) == layers
        )
        names = {layers - 1: "top", 0: "bottom"}
        for place, block in enumerate(blocks):
            name = names.get(place, "between")
            block.register_forward_pre_hook(lambda *_, name=name: self.enter_forward(name))
            block.register_forward_pre_hook(lambda *_, name=name: setattr(self, "block", name))
            block.register_forward_hook(
                lambda _m, _a, out, name=name: self.mark_gradient(out, f"backward {name}")
            )
        self.model.get_input_embeddings().register_forward_hook(
            lambda _m, _a, out: self.mark_gradient(out, "backward embeddings")
        )

    def attend(self, module: Any, query: Tensor, *others: Any, **more: Any) -> Any:
        """By torch's kernel, whatever runs take here; its way back is a stretch of its own
        (memory_estimator.attention_bytes).
        """
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        out, weights = sdpa_attention_forward(module, query, *others, **more)
        self.mark_gradient(out, f"backward {self.block} attention")
        self.mark_gradient(query, f"backward {self.block} below")
        return out, weights

    def mark_gradient(self, out: Any, stretch: str) -> None:
        tensor = out[0] if isinstance(out, tuple) else out
        if tensor.requires_grad:
            tensor.register_hook(lambda _grad: self.storages.enter(stretch, "temporary"))

    def begin_optimizer(self, trained: list[nn.Parameter]) -> None:
        """The optimizer's state as it is from the second step on."""
        if self.optimizer is None:
            self.state = [torch.empty(bytes_8bit(p.numel()), dtype=torch.uint8) for p in trained]
            self.storages.call(self.state, "optimizer")
            return
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for parameter in trained:
            self.storages.call(self.optimizer.state[parameter].values(), "optimizer")

    def step(self, shape: BatchShape) -> dict[str, list[tuple[int, ...]]]:
        """Bytes by kind at every moment of every stretch, for a batch of this shape; those of a
        measurement begin with `eval`.
        """
        self.storages.begin()
        ids = torch.zeros(shape.rows, shape.length, dtype=torch.long)
        labels = FixedLabels(shape)
        for _ in range(2 if self.config.accumulates_gradients else 1):
            self.storages.enter("forward", "activations")
            self.model.train()
            loss = self.loss(ids, labels)
            self.forward = False
            self.storages.enter("backward loss", "logits")
            loss.backward()  # type: ignore[no-untyped-call]
            self.forward = True
            del loss
        self.storages.enter("optimizer", "temporary")
        trained = [p for p in self.model.parameters() if p.requires_grad]
        torch.nn.utils.clip_grad_norm_(trained, 1.0, error_if_nonfinite=False)
        if self.optimizer is not None:
            self.optimizer.step()
        elif self.storages.device == "cpu":  # on CUDA one kernel does it in place
            for parameter in trained:
                torch.empty(widened_8bit(parameter), dtype=torch.uint8)
        for parameter in trained:
            parameter.grad = None
        self.measuring = True
        self.storages.enter("eval forward", "activations")
        self.model.eval()
        with torch.no_grad():
            self.loss(ids, labels)
        self.measuring = False
        return self.storages.moments

    def loss(self, ids: Tensor, labels: FixedLabels) -> Tensor:
        positions = torch.zeros_like(ids) if self.config.packing else None
        return self.head.compute_loss_at_positions(self.model, ids, labels.places, labels.targets, positions)

    def close(self) -> None:
        self.modes.close()


class FixedLabels:
    """Where the trained positions of a batch are: their number decides, not their places, and fake
    tensors have no values.
    """

    def __init__(self, shape: BatchShape) -> None:
        self.places = torch.zeros(shape.trained_tokens, dtype=torch.long)
        self.targets = torch.zeros(shape.trained_tokens, dtype=torch.long)


def with_layers(model_config: Any, layers: int) -> Any:
    """The model's config with fewer layers; of models with a pattern of layer kinds, its first
    ones.
    """
    made = copy.deepcopy(model_config)
    text = made.get_text_config()
    name = "num_hidden_layers" if hasattr(text, "num_hidden_layers") else "n_layer"
    setattr(text, name, layers)
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    return made


def without_attention_dropout(model_config: Any) -> Any:
    """CUDA's attention kernels drop out on the fly; the CPU's, on which we simulate, would keep a
    matrix of all pairs for it.
    """
    made = copy.deepcopy(model_config)
    for config in (made, made.get_text_config()):
        for name in ("attention_dropout", "attn_pdrop"):
            if hasattr(config, name):
                setattr(config, name, 0.0)
    return made


@contextmanager
def packed_or_not(*, packed: bool) -> Iterator[None]:
    """transformers looks at position ids' values to find packed rows; fake ones have none, so it is
    told.
    """

    def told(position_ids: Tensor) -> Tensor | None:
        return torch.zeros_like(position_ids) if packed else None

    with mock.patch("transformers.masking_utils.find_packed_sequence_indices", told):
        yield


def model_config_of(folder: Path) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
