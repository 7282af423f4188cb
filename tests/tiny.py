"""A small real model (Llama with 2 layers), a byte-level BPE tokenizer, and data about lamps."""

import json
import shutil
from pathlib import Path

TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' "
    "}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ROOMS = ("kitchen", "hall", "attic", "garage", "office", "cellar", "porch", "nursery")


def make_row(user, assistant):
    return {
        "messages": [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    }


ROWS = [
    make_row(
        f"turn {state} the {room} lamp",
        json.dumps({"intent": f"Turn{state.title()}", "area": room}),
    )
    for room in ROOMS
    for state in ("on", "off")
] + [make_row(f"is the {room} dark", "yes" if len(room) % 2 else "no") for room in ROOMS]

SETTINGS = {
    "rank": 4,
    "alpha": 8,
    "learning_rate": 0.01,
    "max_steps": 8,
    "max_tokens_per_batch": 160,
    "max_length": 80,
    "eval_steps": 4,
    "save_steps": 4,
    "eval_rows": 4,
    "precision": "fp32",
    "threads": 1,
}


def encode_jsonl(rows):
    return [json.dumps(r).encode() + b"\n" for r in rows]


def make_tokenizer(template=TEMPLATE):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        [m["content"] for r in ROWS for m in r["messages"]] + ["user", "assistant"], trainer
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    wrapped.chat_template = template
    return wrapped


def make_model(folder: Path, *, template=TEMPLATE, hidden=32, layers=2, is_tied=False) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer(template)
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        tie_word_embeddings=is_tied,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def copy_with_panicking_tokenizer(model: Path, folder: Path) -> Path:
    """A copy of a model whose tokenizer panics in Rust when it is loaded."""
    shutil.copytree(model, folder)
    path = folder / "tokenizer.json"
    normalizer = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"normalizer": normalizer}))
    return folder


def make_run(folder: Path, model: Path, rows=ROWS, **settings) -> Path:
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_bytes(b"".join(encode_jsonl(rows[:-4])))
    (folder / "eval.jsonl").write_bytes(b"".join(encode_jsonl(rows[-4:])))
    paths = {
        "model": str(model),
        "train_data": str(folder / "train.jsonl"),
        "eval_data": str(folder / "eval.jsonl"),
    }
    (folder / "config.json").write_text(json.dumps({**SETTINGS, **paths, **settings}))
    return folder


def read_events(folder: Path):
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def get_step_losses(events_):
    """Return the bits of every step's loss. If a step was trained twice, the last one counts."""
    return {e["step"]: float(e["loss"]).hex() for e in events_ if e["kind"] == "step"}


def make_token_lengths(rows):
    """Build token lengths without a tokenizer: 60 tokens per row, of which 20 are trained."""
    import numpy as np

    from training.runs.forecast.token_lengths import LENGTH_CHOICES, TokenLengths

    arrays = {tokens: np.full(rows, tokens, np.int32) for tokens in (60, 40, 20)}
    return TokenLengths(
        arrays[60],
        arrays[20],
        arrays[40],
        dict.fromkeys(LENGTH_CHOICES, arrays[20]),
        rows,
        "model",
        "",
    )
