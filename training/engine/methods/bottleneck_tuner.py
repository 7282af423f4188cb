"""A PEFT tuner for bottleneck adapters: config, layer and model, registered when this module is
imported.

A process must import this module before it loads such an adapter
(`training.engine.modeling.library_patches` does).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _get_in_out_features
from peft.utils import PeftType, register_peft_method
from torch import Tensor, nn
from torch.nn import functional

ACTIVATIONS = {"relu": functional.relu, "gelu": functional.gelu, "silu": functional.silu}
PEFT_TYPE_NAME = "BOTTLENECK"


def register_peft_type(name: str) -> None:
    """Add a member to PeftType. Enums do not support that, so this sets what the class statement
    would have set.
    """
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    PeftType._member_map_[name] = PeftType._value2member_map_[name] = member
    PeftType._member_names_.append(name)
    type.__setattr__(PeftType, name, member)


register_peft_type(PEFT_TYPE_NAME)


@dataclass
class BottleneckConfig(PeftConfig):  # type: ignore[misc] # peft has no types
    """`target_modules` are suffixes of module names. The adapter is applied to the output of each
    matching module, before the residual is added.
    """

    bottleneck_size: int = field(
        default=64, metadata={"help": "features between down- and up-projection"}
    )
    activation: str = field(default="relu", metadata={"help": "relu, gelu or silu"})
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "suffixes of module names"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = getattr(PeftType, PEFT_TYPE_NAME)


class BottleneckLayer(nn.Module, BaseTunerLayer):  # type: ignore[misc]
    """y + up(activation(down(y))), where y (..., features) is the output of the wrapped layer. `up`
    is initialized with zeros, so at first the layer changes nothing.
    """

    adapter_layer_names = ("bottleneck_down", "bottleneck_up")
    other_param_names = ("activation_fns",)
    # Attributes of BaseTunerLayer, declared here because PEFT has no type hints
    active_adapters: Any
    set_adapter: Any
    get_base_layer: Any
    _move_adapter_to_device_of_base_layer: Any

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: BottleneckConfig) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.bottleneck_down = nn.ModuleDict()
        self.bottleneck_up = nn.ModuleDict()
        self.activation_fns: dict[str, Any] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: BottleneckConfig) -> None:
        _, features = _get_in_out_features(self.get_base_layer())
        down, up = (
            nn.Linear(features, config.bottleneck_size),
            nn.Linear(config.bottleneck_size, features),
        )
        nn.init.normal_(down.weight, std=0.02)
        for zero in (down.bias, up.weight, up.bias):
            nn.init.zeros_(zero)
        self.bottleneck_down[adapter_name], self.bottleneck_up[adapter_name] = down, up
        self.activation_fns[adapter_name] = ACTIVATIONS[config.activation]
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise ValueError(
            "Bottleneck adapters cannot be merged: they have an activation between the projections."
        )

    def unmerge(self) -> None:
        raise ValueError("Bottleneck adapters are never merged.")

    def compute_delta(self, adapter_name: str, y: Tensor) -> Tensor:
        down: Any
        up: Any
        down, up = self.bottleneck_down[adapter_name], self.bottleneck_up[adapter_name]
        hidden = self.activation_fns[adapter_name](down(y.to(down.weight.dtype)))
        return up(hidden).to(y.dtype)  # type: ignore[no-any-return]

    def forward(
        self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any
    ) -> Tensor:
        y: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return y
        if adapter_names is not None:
            return self.forward_mixed_batch(y, adapter_names)
        for name in self.active_adapters:
            if name in self.bottleneck_down:
                y = y + self.compute_delta(name, y)
        return y

    def forward_mixed_batch(self, y: Tensor, adapter_names: list[str]) -> Tensor:
        """Apply to each row of the batch the adapter with its name, and none to `__base__` rows."""
        out = y.clone()
        for name in set(adapter_names) & set(self.bottleneck_down):
            rows = [i for i, wanted_name in enumerate(adapter_names) if wanted_name == name]
            out[rows] = y[rows] + self.compute_delta(name, y[rows])
        return out


class BottleneckModel(BaseTuner):  # type: ignore[misc] # peft has no types
    """The tuner: wraps every target module in a BottleneckLayer."""

    prefix: str = "bottleneck_"
    tuner_layer_cls = BottleneckLayer
    target_module_mapping: dict[str, list[str]] = {}  # the config always names its modules

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: Any,
        target_name: str,
        parent: Any,
        current_key: str,
        **_: Any,
    ) -> None:
        if isinstance(target, BottleneckLayer):
            target.update_layer(adapter_name, peft_config)
            return
        layer = BottleneckLayer(target, adapter_name, peft_config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    @contextmanager
    def _enable_peft_forward_hooks(
        self, *_args: Any, adapter_names: list[str] | None = None, **_kwargs: Any
    ) -> Iterator[None]:
        """Pass the adapter names to every layer during a forward, as PEFT does for mixed
        batches.
        """
        hook = partial(_set_adapter_names, adapter_names or [])
        layers = (
            [layer for layer in self.modules() if isinstance(layer, BottleneckLayer)]
            if adapter_names
            else []
        )
        handles = [layer.register_forward_pre_hook(hook, with_kwargs=True) for layer in layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _set_adapter_names(
    names: list[str], _layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    return args, {**kwargs, "adapter_names": names}


register_peft_method(name="bottleneck", config_cls=BottleneckConfig, model_cls=BottleneckModel)
