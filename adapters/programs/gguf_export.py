"""`python -m adapters.programs.gguf_export FOLDER`: a model as one GGUF file, run back through
llama.cpp before it is kept.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from training.engine.fast_imports import fast_imports
from training.errors import UserError

with fast_imports():
    import torch

    from adapters.programs.gguf_file import export
    from adapters.programs.llama_cpp import answers, top_logprobs
    from adapters.programs.parity import Spoken, speak
    from training.child_process import emit, main, read_params
    from training.engine.data.conversations import load_tokenizer, encode_prompt, ensure_chat_template
    from training.engine.files import sha256_file, fsync_path
    from training.engine.modeling.model import load_base

CPU = torch.device("cpu")
TOP = 20
SCORED_PROMPTS = 2  # whose answers are compared token by token: llama.cpp is asked once a token
# The share of places where the same token must come next. Measured on SmolLM2-135M: f16 1.000, q8_0
# 0.944, q4_0 0.667.
LEAST_SAME = {"f32": 0.98, "f16": 0.95, "bf16": 0.9, "q8_0": 0.75}
LEAST_SAME_OTHERS = 0.3


def make(order: dict[str, Any]) -> dict[str, Any]:
    """Order: model (a folder), target (a file), quantization, and prompts as lists of messages.
    Result: parity, bytes, sha256.
    """
    folder, target, quantization = (
        Path(order["model"]),
        Path(order["target"]),
        str(order["quantization"]),
    )
    emit(message="writing the file", done=0, total=3)
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.checking")
    export(folder, aside, quantization)
    try:
        emit(message="answering with torch", done=1)
        tokenizer = load_tokenizer(folder)
        ensure_chat_template(tokenizer)
        model = load_base(folder, torch.float32, CPU).eval()
        said = [
            speak(model, encode_prompt(tokenizer, {"messages": messages}), tokenizer.eos_token_id)
            for messages in order["prompts"]
        ]
        del model
        emit(message="answering with llama.cpp", done=2)
        figures = compared(aside, said)
        refuse_unlike(figures, quantization)
        fsync_path(aside)
        aside.rename(target)
    finally:
        aside.unlink(missing_ok=True)
    fsync_path(target.parent)
    return {
        "parity": figures,
        "bytes": target.stat().st_size,
        "sha256": sha256_file(target),
        "quantization": quantization,
    }


def compared(file: Path, said: list[Spoken]) -> dict[str, Any]:
    """llama.cpp's greedy answers beside torch's, and its log-probability of torch's choice at each
    place of some answers.
    """
    theirs = answers(file, [one.prompt for one in said], max(len(one.answer) for one in said))
    same = sum(alike(one.answer, other.ids) for one, other in zip(said, theirs, strict=True))
    differences, choices = [], []
    for one in said[:SCORED_PROMPTS]:
        tops = top_logprobs(file, one.whole[:-1], TOP, start=len(one.prompt))
        ours = one.logits.log_softmax(-1)
        for place, top in enumerate(tops):
            best = int(ours[place].argmax())
            choices.append(max(top, key=lambda token: top[token]) == best)
            if best in top:
                differences.append(abs(top[best] - float(ours[place, best])))
    return {
        "prompts": len(said),
        "same_answers": same,
        "tokens": len(choices),
        "same_choice": sum(choices) / max(1, len(choices)),
        "largest_difference": max(differences, default=0.0),
    }


def alike(ours: list[int], theirs: list[int]) -> bool:
    """Equal but for the token that ends an answer, which llama.cpp may leave out."""
    shorter = min(len(ours), len(theirs))
    return ours[:shorter] == theirs[:shorter] and abs(len(ours) - len(theirs)) <= 1


def refuse_unlike(figures: dict[str, Any], quantization: str) -> None:
    """Raises UserError: the file answers unlike the model that it was made from."""
    least = LEAST_SAME.get(quantization, LEAST_SAME_OTHERS)
    if figures["same_choice"] < least:
        raise UserError(
            f"The {quantization} file answers unlike its model: llama.cpp chooses the same next "
            f"token in {figures['same_choice']:.0%} of {figures['tokens']} places, and at least "
            f"{least:.0%} are expected. Take more bits."
        )


if __name__ == "__main__":
    sys.exit(main(lambda: emit(result=make(read_params()))))
