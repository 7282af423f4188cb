"""Questions, and where they wait until the speaker takes them. No torch here: the program holds none until it is first asked.

Importing it takes 5 s and 410 MB, on a machine where perhaps nobody ever asks.
"""

from __future__ import annotations

import json
import os
import queue
import threading
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from training.engine.quick_imports import quick_imports

MAX_QUESTIONS = 64  # under way and waiting; the next one is told to come back

# Settings of PEFT's LoraConfig with which a layer computes otherwise.
MORE_THAN_PAIRS = (
    *("modules_to_save", "trainable_token_indices", "target_parameters", "layer_replication", "lora_bias", "use_dora"),
    *("alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config", "velora_config", "use_bdlora", "use_qalora"),
)

Said = dict[str, Any]


class Base(NamedTuple):
    """A model's folder, in 4 bits or not; `sha256` tells the weights of a run that trained the whole model."""

    folder: Path
    quantised: bool = False
    sha256: str = ""


class Weights(NamedTuple):
    """An adapter's folder and the hash of its weights: other weights in the same folder are another adapter."""

    folder: Path
    sha256: str

    @property
    def kind(self) -> str:
        """PEFT's type of it; DoRA, and LoRA with modules of its own, count as another, whose rows cannot share a batch."""
        config: dict[str, Any] = json.loads((self.folder / "adapter_config.json").read_text())
        kind = str(config["peft_type"])
        return "LORA AND MORE" if kind == "LORA" and not is_pairs_only(config) else kind


def is_pairs_only(config: dict[str, Any]) -> bool:
    """Are pairs A and B all that this LoRA adapter (its adapter_config.json) changes?"""
    return config.get("bias", "none") == "none" and not any(config.get(name) for name in MORE_THAN_PAIRS)


@dataclass
class Question:
    """What to answer, with which adapter (None: the base alone), and where the answer goes.

    Either `messages` of a chat, or the text of a `prompt`. `score`: no answer is asked, only how likely each token of it is.
    """

    base: Base
    adapter: Weights | None
    messages: list[dict[str, str]] = field(default_factory=list)
    prompt: str | None = None
    max_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = 0
    stop: tuple[str, ...] = ()
    score: bool = False
    said: queue.Queue[Said] = field(default_factory=queue.Queue)
    hung_up: threading.Event = field(default_factory=threading.Event)
    told: set[str] = field(default_factory=set)  # what it is waiting for, told once
    ids: list[int] = field(default_factory=list)  # of its prompt, once they are known


class Busy(Exception):
    """MAX_QUESTIONS are under way."""


class Desk:
    """Takes questions in, and gives their places back with the last word."""

    def __init__(self) -> None:
        self.arrived: queue.Queue[Question] = queue.Queue()
        self._asked = threading.Event()
        self._count = 0
        self._lock = threading.Lock()

    @property
    def count(self) -> int:
        """Questions under way and waiting."""
        return self._count

    def ask(self, question: Question) -> None:
        """Take a question. `question.said` gets `{"text"}` pieces, perhaps `{"status"}` before, then `{"done"}` or `{"error"}`.

        A caller who goes away sets `question.hung_up`; the place is free when the last word is said, whatever it is.

        Raises:
            Busy: MAX_QUESTIONS are under way.
        """
        with self._lock:
            if self._count >= MAX_QUESTIONS:
                raise Busy(f"{self._count} questions are being answered; try again in a few seconds.")
            self._count += 1
        self.arrived.put(question)
        self._asked.set()

    def last_word(self, question: Question, said: Said) -> None:
        with self._lock:
            self._count -= 1
        question.said.put(said)

    def open(self) -> None:
        """Let the questions be answered, by a thread that wakes with the first one."""
        threading.Thread(target=self._open, name="speaker", daemon=True).start()

    def _open(self) -> None:
        self._asked.wait()
        try:
            with quick_imports():
                from adapters.inference.speaker import Speaker

            Speaker(self).speak_for_ever()
        finally:
            traceback.print_exc()
            os._exit(70)  # nobody would answer any more; `up` starts the program again
