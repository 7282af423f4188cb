"""Requests to the inference scheduler and references to models. No torch here."""

from __future__ import annotations

import json
import queue
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from adapters.inference.answer_format import AnswerFormat

# Settings of PEFT's LoraConfig with which a layer computes more than x A' B'.
NON_PLAIN_LORA_KEYS = (
    "modules_to_save",
    "trainable_token_indices",
    "target_parameters",
    "layer_replication",
    "lora_bias",
    "use_dora",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "velora_config",
    "use_bdlora",
    "use_qalora",
)

StreamEvent = dict[str, Any]


class BaseRef(NamedTuple):
    """A base model: its folder, and whether it is loaded in 4 bits. `sha256` identifies the weights
    of a merged model or of full fine-tuning.
    """

    folder: Path
    quantized: bool = False
    sha256: str = ""


class AdapterRef(NamedTuple):
    """An adapter's folder and the hash of its weights. If the weights in the folder change, it is
    another adapter.
    """

    folder: Path
    sha256: str

    @property
    def kind(self) -> str:
        """PEFT's type. DoRA and LoRA with fully trained modules count as another type: their rows
        cannot share a batch with plain LoRA.
        """
        config: dict[str, Any] = json.loads((self.folder / "adapter_config.json").read_text())
        kind = str(config["peft_type"])
        return "LORA AND MORE" if kind == "LORA" and not is_plain_lora(config) else kind


def is_plain_lora(config: dict[str, Any]) -> bool:
    """Whether the adapter with this adapter_config.json has A and B matrices only."""
    return config.get("bias", "none") == "none" and not any(
        config.get(name) for name in NON_PLAIN_LORA_KEYS
    )


@dataclass
class GenerationRequest:
    """One text to generate: from the `messages` of a chat, or from a `prompt`.

    `adapter` None means the base model. The answer may call `tools`: it must call `forced_tool`
    (any tool if this is empty) unless that is None, and makes at most `max_calls` calls. With
    `needs_logprobs`, the log-probabilities of the prompt's tokens are sent first. The scheduler
    puts its events into `events`.
    """

    base: BaseRef
    adapter: AdapterRef | None
    user: str = ""  # whose share of the server it counts for
    messages: list[dict[str, Any]] = field(default_factory=list)
    tools: list[dict[str, Any]] = field(default_factory=list)
    forced_tool: str | None = None
    max_calls: int | None = None
    prompt: str | None = None
    max_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = 0
    stop: tuple[str, ...] = ()
    needs_logprobs: bool = False
    events: queue.Queue[StreamEvent] = field(default_factory=queue.Queue)
    cancelled: threading.Event = field(default_factory=threading.Event)
    sent_statuses: set[str] = field(default_factory=set)  # each is sent once
    # Filled when it is admitted
    prompt_ids: list[int] = field(default_factory=list)
    answer_format: AnswerFormat = field(default_factory=AnswerFormat)


class QueueFull(Exception):
    """The queue has MAX_REQUESTS open requests."""
