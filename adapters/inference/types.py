"""What is asked of the inference program, and what it answers. No torch here."""

from __future__ import annotations

import json
import queue
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

# Settings of PEFT's LoraConfig with which a layer computes otherwise.
NON_PLAIN_LORA_KEYS = (
    *(
        "modules_to_save",
        "trainable_token_indices",
        "target_parameters",
        "layer_replication",
        "lora_bias",
        "use_dora",
    ),
    *(
        "alora_invocation_tokens",
        "arrow_config",
        "kasa_config",
        "monteclora_config",
        "velora_config",
        "use_bdlora",
        "use_qalora",
    ),
)

StreamEvent = dict[str, Any]


class BaseRef(NamedTuple):
    """A model's folder, in 4 bits or not; `sha256` tells the weights of a run that trained the
    whole model.
    """

    folder: Path
    quantized: bool = False
    sha256: str = ""


class AdapterRef(NamedTuple):
    """An adapter's folder and the hash of its weights: other weights in the same folder are another
    adapter.
    """

    folder: Path
    sha256: str

    @property
    def kind(self) -> str:
        """PEFT's type of it; DoRA, and LoRA with modules of its own, count as another, whose rows
        cannot share a batch.
        """
        config: dict[str, Any] = json.loads((self.folder / "adapter_config.json").read_text())
        kind = str(config["peft_type"])
        return "LORA AND MORE" if kind == "LORA" and not is_plain_lora(config) else kind


def is_plain_lora(config: dict[str, Any]) -> bool:
    """Are pairs A and B all that this LoRA adapter (its adapter_config.json) changes?"""
    return config.get("bias", "none") == "none" and not any(
        config.get(name) for name in NON_PLAIN_LORA_KEYS
    )


@dataclass
class GenerationRequest:
    """What to answer, with which adapter (None: the base alone), and where the answer goes.

    Either `messages` of a chat, or the text of a `prompt`. `score`: no answer is asked, only how
    likely each token of it is.
    """

    base: BaseRef
    adapter: AdapterRef | None
    messages: list[dict[str, str]] = field(default_factory=list)
    prompt: str | None = None
    max_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = 0
    stop: tuple[str, ...] = ()
    needs_logprobs: bool = False
    events: queue.Queue[StreamEvent] = field(default_factory=queue.Queue)
    cancelled: threading.Event = field(default_factory=threading.Event)
    sent_statuses: set[str] = field(default_factory=set)  # what it is waiting for, told once
    prompt_ids: list[int] = field(default_factory=list)  # of its prompt, once they are known


class QueueFull(Exception):
    """MAX_REQUESTS are under way."""
