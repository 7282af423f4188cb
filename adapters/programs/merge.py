"""`python -m adapters.programs.merge FOLDER`: a version merged into its base, checked against its
adapter, put in place whole.

A merge that is killed leaves nothing in place; begun again, it goes on with the merged model if
that was written, and checks it.
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

    from adapters.programs.parity import Spoken, compared, logits_of, refuse_unlike, speak
    from training.child_process import emit, main, read_params
    from training.engine.data.conversations import load_tokenizer, encode_prompt, ensure_chat_template
    from training.engine.files import remove_tree, sha256_file, fsync_path
    from training.engine.methods import METHODS
    from training.engine.modeling.merge import merge_adapter
    from training.engine.modeling.model import count_parameters, load_base
    from training.engine.modeling.weights import load_adapter

CPU = torch.device("cpu")
SPARE_BYTES = 10**9  # that stay free on the disk


def merge(order: dict[str, Any]) -> dict[str, Any]:
    """Order: base, adapter, method, target (folders and a name), and prompts as lists of messages.
    Result: parity and files.
    """
    base, adapter, target = Path(order["base"]), Path(order["adapter"]), Path(order["target"])
    tokenizer = load_tokenizer(base)
    ensure_chat_template(tokenizer)
    prompts = [encode_prompt(tokenizer, {"messages": messages}) for messages in order["prompts"]]
    written = target.with_name(f".{target.name}.unchecked")
    try:
        if not written.is_dir():
            write(order, tokenizer, written)
        said, plain = adapter_answers(
            base, adapter, order["method"], prompts, tokenizer.eos_token_id
        )
        figures = checked(written, said, plain, tokenizer.eos_token_id)
    except UserError:
        remove_tree(written)  # refused: it may be gigabytes
        raise
    files = {
        path.name: {"sha256": sha256_file(path), "bytes": path.stat().st_size}
        for path in sorted(written.iterdir())
    }
    remove_tree(target)
    written.rename(target)
    fsync_path(target.parent)
    return {
        "parity": figures,
        "files": files,
        "bytes": sum(facts["bytes"] for facts in files.values()),
    }


def write(order: dict[str, Any], tokenizer: Any, folder: Path) -> None:
    """The merged model in a folder that is there only when it is whole, on the disk. Raises
    UserError: the disk is too full.
    """
    aside = folder.with_suffix(".merging")
    remove_tree(aside)
    try:
        emit(message="merging", done=0, total=3 * len(order["prompts"]))
        model = merge_adapter(Path(order["base"]), Path(order["adapter"]), order["method"])
        refuse_full_disk(folder.parent, 2 * count_parameters(model))
        emit(message="writing")
        model.save_pretrained(aside, max_shard_size="1000GB")
        tokenizer.save_pretrained(aside)
        del model
        gc.collect()
        for path in aside.iterdir():
            fsync_path(path)
        aside.rename(folder)
    finally:
        remove_tree(aside)


def adapter_answers(
    base: Path, adapter: Path, method: str, prompts: list[list[int]], ends: int | None
) -> tuple[list[Spoken], list[torch.Tensor]]:
    """What base and adapter say together, in fp32, and the base's own logits along it."""
    emit(message="loading base and adapter", done=0, total=3 * len(prompts))
    model = load_adapter(
        load_base(base, torch.float32, CPU, quantized=METHODS[method].has_quantized_base), adapter, "default"
    )
    said, plain = [], []
    for done, prompt in enumerate(prompts):
        emit(message="answering with the adapter", done=done)
        said.append(speak(model, prompt, ends))
        with model.disable_adapter():
            plain.append(logits_of(model, prompt, said[-1].answer))
    return said, plain


def checked(
    folder: Path, said: list[Spoken], plain: list[torch.Tensor], ends: int | None
) -> dict[str, Any]:
    """The parity of the model in a folder, read back as it will be used.

    Raises:
        UserError: it is not the adapter's; nothing is left of it.
    """
    model = load_base(folder, torch.float32, CPU).eval()
    logits, answers = [], []
    for done, one in enumerate(said):
        emit(message="answering with the merged model", done=2 * len(said) + done)
        logits.append(logits_of(model, one.prompt, one.answer))
        answers.append(speak(model, one.prompt, ends).answer)
    figures = compared(said, plain, logits, answers)
    refuse_unlike(figures, "merged model")
    return figures


def refuse_full_disk(folder: Path, needed: int) -> None:
    """Raises UserError: the disk would not hold it."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < needed + SPARE_BYTES:
        raise UserError(
            f"The merged model needs {format_bytes(needed)} and {format_bytes(SPARE_BYTES, 0)} "
            f"must stay free, but the disk has {format_bytes(free)}. Delete what is not needed "
            "(Adapters, Disk), or answer with the adapter attached."
        )


if __name__ == "__main__":
    sys.exit(main(lambda: emit(result=merge(read_params()))))
