"""`python -m adapters.programs.gguf_export FOLDER`: export a model as a GGUF file and check it by
running it in llama.cpp.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from training.engine.fast_imports import fast_imports
from training.errors import UserError

with fast_imports():
    import torch

    from adapters.programs.gguf_file import write_gguf
    from adapters.programs.llama_cpp import generate_answers, get_top_logprobs
    from adapters.programs.parity import Generation, generate_greedily
    from training.child_process import emit_message, main, read_params
    from training.engine.data.conversations import (
        encode_prompt,
        ensure_chat_template,
        load_tokenizer,
    )
    from training.engine.files import fsync_path, sha256_file
    from training.engine.modeling.model import load_base

CPU = torch.device("cpu")
MAX_TOP_TOKENS = 20
SCORED_PROMPTS = 2  # compared token by token, with one call of llama.cpp per token
# The minimum share of positions with the same next token. Measured on SmolLM2-135M: f16 1.000,
# q8_0 0.944, q4_0 0.667.
MIN_SAME_CHOICE = {"f32": 0.98, "f16": 0.95, "bf16": 0.9, "q8_0": 0.75}
MIN_SAME_CHOICE_OTHERS = 0.3


def export_and_check(params: dict[str, Any]) -> dict[str, Any]:
    """Write the GGUF file and compare its answers with the model's.

    Parameters: model (a folder), target (a file), quantization, and prompts as lists of messages.
    Result: parity, bytes, sha256, quantization.
    """
    folder, target, quantization = (
        Path(params["model"]),
        Path(params["target"]),
        str(params["quantization"]),
    )
    emit_message(message="writing the file", done=0, total=3)
    target.parent.mkdir(parents=True, exist_ok=True)
    unchecked = target.with_name(f".{target.name}.checking")
    write_gguf(folder, unchecked, quantization)
    try:
        emit_message(message="generating with PyTorch", done=1)
        tokenizer = load_tokenizer(folder)
        ensure_chat_template(tokenizer)
        model = load_base(folder, torch.float32, CPU).eval()
        references = [
            generate_greedily(
                model, encode_prompt(tokenizer, {"messages": messages}), tokenizer.eos_token_id
            )
            for messages in params["prompts"]
        ]
        del model
        emit_message(message="generating with llama.cpp", done=2)
        parity = compare_answers(unchecked, references)
        check_parity(parity, quantization)
        fsync_path(unchecked)
        unchecked.rename(target)
    finally:
        unchecked.unlink(missing_ok=True)
    fsync_path(target.parent)
    return {
        "parity": parity,
        "bytes": target.stat().st_size,
        "sha256": sha256_file(target),
        "quantization": quantization,
    }


def compare_answers(file: Path, references: list[Generation]) -> dict[str, Any]:
    """Compare llama.cpp's greedy answers with PyTorch's, and for some answers the log-probability
    of PyTorch's choice at each position.
    """
    gguf_answers = generate_answers(
        file, [one.prompt for one in references], max(len(one.answer) for one in references)
    )
    same_answers = sum(
        is_same_answer(one.answer, other.ids)
        for one, other in zip(references, gguf_answers, strict=True)
    )
    differences, matches = [], []
    for one in references[:SCORED_PROMPTS]:
        top_tokens = get_top_logprobs(
            file, one.token_ids[:-1], MAX_TOP_TOKENS, start=len(one.prompt)
        )
        logprobs = one.logits.log_softmax(-1)
        for position, top in enumerate(top_tokens):
            best = int(logprobs[position].argmax())
            matches.append(max(top, key=lambda token: top[token]) == best)
            if best in top:
                differences.append(abs(top[best] - float(logprobs[position, best])))
    return {
        "prompts": len(references),
        "same_answers": same_answers,
        "tokens": len(matches),
        "same_choice": sum(matches) / max(1, len(matches)),
        "largest_difference": max(differences, default=0.0),
    }


def is_same_answer(ours: list[int], theirs: list[int]) -> bool:
    """Whether the answers are equal, except for an end-of-sequence token that llama.cpp omits."""
    shorter = min(len(ours), len(theirs))
    return ours[:shorter] == theirs[:shorter] and abs(len(ours) - len(theirs)) <= 1


def check_parity(parity: dict[str, Any], quantization: str) -> None:
    """Raises UserError: the file's answers differ too much from the model's."""
    minimum = MIN_SAME_CHOICE.get(quantization, MIN_SAME_CHOICE_OTHERS)
    if parity["same_choice"] < minimum:
        raise UserError(
            f"The {quantization} file does not match its model: llama.cpp chooses the same next "
            f"token in {parity['same_choice']:.0%} of {parity['tokens']} positions, but at least "
            f"{minimum:.0%} are expected. Choose a format with more bits.",
            code="no_parity",
        )


if __name__ == "__main__":
    sys.exit(main(lambda: emit_message(result=export_and_check(read_params()))))
