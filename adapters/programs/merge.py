"""`python -m adapters.programs.merge FOLDER`: merge an adapter into its base model and check the
answers of the result.

The target folder appears only when the merged model is complete and checked. If the program is
killed and started again, it continues with a merged model that was already written.
"""

from __future__ import annotations

import gc
import shutil
import sys
from pathlib import Path
from typing import Any

from training.engine.fast_imports import fast_imports
from training.errors import UserError
from training.formatting import format_bytes

with fast_imports():
    import torch

    from adapters.programs.parity import (
        Generation,
        check_parity,
        compute_logits,
        generate_greedily,
        measure_parity,
    )
    from training.child_process import emit_message, main, read_params
    from training.engine.data.conversations import (
        encode_prompt,
        ensure_chat_template,
        load_tokenizer,
    )
    from training.engine.files import fsync_path, remove_tree, sha256_file
    from training.engine.methods import METHODS
    from training.engine.modeling.merge import merge_adapter
    from training.engine.modeling.model import count_parameters, load_base
    from training.engine.modeling.weights import load_adapter

CPU = torch.device("cpu")
MIN_FREE_BYTES = 10**9  # stays free on the disk


def run_merge(params: dict[str, Any]) -> dict[str, Any]:
    """Merge, check and move the result to the target folder.

    Parameters: base, adapter, target (folders), method, and prompts as lists of messages.
    Result: parity, files, bytes.
    """
    base, adapter, target = Path(params["base"]), Path(params["adapter"]), Path(params["target"])
    tokenizer = load_tokenizer(base)
    ensure_chat_template(tokenizer)
    prompts = [encode_prompt(tokenizer, {"messages": messages}) for messages in params["prompts"]]
    unchecked = target.with_name(f".{target.name}.unchecked")
    try:
        if not unchecked.is_dir():
            write_merged(params, tokenizer, unchecked)
        references, base_logits = generate_references(
            base, adapter, params["method"], prompts, tokenizer.eos_token_id
        )
        parity = check_merged(unchecked, references, base_logits, tokenizer.eos_token_id)
    except UserError:
        remove_tree(unchecked)  # a failed check must not leave gigabytes behind
        raise
    files = {
        path.name: {"sha256": sha256_file(path), "bytes": path.stat().st_size}
        for path in sorted(unchecked.iterdir())
    }
    remove_tree(target)
    unchecked.rename(target)
    fsync_path(target.parent)
    return {
        "parity": parity,
        "files": files,
        "bytes": sum(file["bytes"] for file in files.values()),
    }


def write_merged(params: dict[str, Any], tokenizer: Any, folder: Path) -> None:
    """Write the merged model to the folder, completely and synced to disk, or not at all.

    Raises:
        UserError: the disk is too full.
    """
    partial_folder = folder.with_suffix(".merging")
    remove_tree(partial_folder)
    try:
        emit_message(message="merging", done=0, total=3 * len(params["prompts"]))
        model = merge_adapter(Path(params["base"]), Path(params["adapter"]), params["method"])
        check_disk_space(folder.parent, 2 * count_parameters(model))
        emit_message(message="writing")
        model.save_pretrained(partial_folder, max_shard_size="1000GB")
        tokenizer.save_pretrained(partial_folder)
        del model
        gc.collect()
        for path in partial_folder.iterdir():
            fsync_path(path)
        partial_folder.rename(folder)
    finally:
        remove_tree(partial_folder)


def generate_references(
    base: Path, adapter: Path, method: str, prompts: list[list[int]], eos_token_id: int | None
) -> tuple[list[Generation], list[torch.Tensor]]:
    """Answers of base and adapter in fp32, and the base model's logits along these answers."""
    emit_message(message="loading base model and adapter", done=0, total=3 * len(prompts))
    model = load_adapter(
        load_base(base, torch.float32, CPU, quantized=METHODS[method].has_quantized_base),
        adapter,
        "default",
    )
    references, base_logits = [], []
    for done, prompt in enumerate(prompts):
        emit_message(message="generating with the adapter", done=done)
        references.append(generate_greedily(model, prompt, eos_token_id))
        with model.disable_adapter():
            base_logits.append(compute_logits(model, prompt, references[-1].answer))
    return references, base_logits


def check_merged(
    folder: Path,
    references: list[Generation],
    base_logits: list[torch.Tensor],
    eos_token_id: int | None,
) -> dict[str, Any]:
    """Load the merged model from its folder and measure its parity with the adapter.

    Raises:
        UserError: its answers differ from the adapter's.
    """
    model = load_base(folder, torch.float32, CPU).eval()
    logits, answers = [], []
    for done, reference in enumerate(references):
        emit_message(message="generating with the merged model", done=2 * len(references) + done)
        logits.append(compute_logits(model, reference.prompt, reference.answer))
        answers.append(generate_greedily(model, reference.prompt, eos_token_id).answer)
    parity = measure_parity(references, base_logits, logits, answers)
    check_parity(parity, "merged model")
    return parity


def check_disk_space(folder: Path, needed_bytes: int) -> None:
    """Raises UserError: there is not enough free disk space."""
    folder.mkdir(parents=True, exist_ok=True)
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes + MIN_FREE_BYTES:
        raise UserError(
            f"The merged model needs {format_bytes(needed_bytes)} and "
            f"{format_bytes(MIN_FREE_BYTES, 0)} must stay free, but the disk has only "
            f"{format_bytes(free_bytes)} left. Free disk space (Adapters, Disk), or serve the "
            "adapter unmerged.",
            code="disk_full",
        )


if __name__ == "__main__":
    sys.exit(main(lambda: emit_message(result=run_merge(read_params()))))
