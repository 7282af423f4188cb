"""Write a transformers tokenizer into a GGUF file, so that llama.cpp makes the same tokens.

Supported are byte-level BPE (GPT-2, Llama 3, Qwen, SmolLM) and SentencePiece BPE with `▁` for
spaces (Llama 2, Mistral, Gemma). llama.cpp has a fixed list of pretokenizers with names; it cannot
read their rules from the file. The right name is found by comparing how the tokenizer and each
pretokenizer split PROBE_TEXT, where all of them differ.
"""

from __future__ import annotations

import json
from typing import Any

import gguf
from gguf import TokenType

from training.errors import UserError

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
TRAILING_SPACE = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
LETTER_RUNS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
CASED_LETTERS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+%s|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*%s"
)
LLAMA3 = (
    rf"{CONTRACTIONS}|{LETTER_RUNS}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*{TRAILING_SPACE}"
)
PRETOKENIZERS = {  # llama.cpp's name: its split patterns, applied one after another
    "gpt-2": [GPT2],
    "smollm": [r"\p{N}", GPT2],
    "llama-bpe": [LLAMA3],
    "qwen2": [
        rf"{CONTRACTIONS}|{LETTER_RUNS}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*{TRAILING_SPACE}"
    ],
    "qwen35": [
        rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| "
        rf"?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*{TRAILING_SPACE}"
    ],
    "gpt-4o": [
        CASED_LETTERS % (f"{CONTRACTIONS}?", f"{CONTRACTIONS}?")
        + rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*{TRAILING_SPACE}"
    ],
    "tekken": [
        CASED_LETTERS % ("", "") + rf"|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*{TRAILING_SPACE}"
    ],
}
PROBE_TEXT = (
    "Don't DON'T we'LL  it's'tis 1 22 333 4444 55555 x1y 3.14 ½²\n\n  \n\tHTTPServer camelCase "
    "ÉcoleÉtÉ naïve e\u0301te\u0301 日本語テキスト 한국어 नमस्ते 🦜🦜 #!?/ \r\n//\n ,,\n( a)/\n_b_ "
    "\u00a0\u2003 z   \n"
)


def add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Any, *, rows: int) -> None:
    """Add the vocabulary, merges, special tokens and chat template.

    `rows` is the number of rows of the embedding. llama.cpp needs a token for each, so unused rows
    get a placeholder name.
    """
    inner: Any = tokenizer.backend_tokenizer
    tokenizer_json = json.loads(inner.to_str())
    model = tokenizer_json["model"]
    if model["type"] != "BPE" or not model.get("merges"):
        raise UserError(f"GGUF export supports BPE tokenizers with merges, not {model['type']}.")
    if len(model["vocab"]) > rows:
        raise UserError(
            f"The tokenizer has {len(model['vocab'])} tokens, but the model's embedding has only "
            f"{rows} rows."
        )
    token_texts = {id_: text for text, id_ in inner.get_vocab(with_added_tokens=True).items()}
    is_sentencepiece = model.get("byte_fallback", False)
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
    writer.add_token_list([token_texts.get(id_, f"[PAD{id_}]") for id_ in range(rows)])
    writer.add_token_types(
        token_types(
            token_texts,
            inner,
            rows=rows,
            unknown_token=model.get("unk_token") if is_sentencepiece else None,
        )
    )
    if is_sentencepiece:
        writer.add_tokenizer_model("llama")
        writer.add_token_scores(token_scores(token_texts, merges, rows=rows))
        writer.add_add_space_prefix(
            has_space_prefix(tokenizer_json, has_chat_template=bool(tokenizer.chat_template))
        )
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(find_pretokenizer(inner, tokenizer_json))
        writer.add_token_merges(merges)
        writer.add_add_space_prefix(False)
    add_special_tokens(writer, tokenizer, rows=rows)


def token_types(
    token_texts: dict[int, str], inner: Any, *, rows: int, unknown_token: str | None
) -> list[TokenType]:
    added_tokens = inner.get_added_tokens_decoder()
    types = []
    for id_ in range(rows):
        text = token_texts.get(id_)
        if text is None:
            types.append(TokenType.UNUSED)
        elif unknown_token is not None and text == unknown_token:
            types.append(TokenType.UNKNOWN)
        elif id_ in added_tokens:
            types.append(TokenType.CONTROL if added_tokens[id_].special else TokenType.USER_DEFINED)
        elif unknown_token is not None and len(text) == len("<0x00>") and text.startswith("<0x"):
            types.append(TokenType.BYTE)
        else:
            types.append(TokenType.NORMAL)
    return types


def token_scores(token_texts: dict[int, str], merges: list[str], *, rows: int) -> list[float]:
    """The score of each token. SentencePiece joins the pair with the highest score first."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault(merge.replace(" ", ""), rank)
    return [-float(ranks.get(token_texts.get(id_, ""), len(merges))) for id_ in range(rows)]


def find_pretokenizer(inner: Any, tokenizer_json: dict[str, Any]) -> str:
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

    if (tokenizer_json["normalizer"] or {"type": "NFC"})[
        "type"
    ] != "NFC" or "ByteLevel" not in json.dumps(tokenizer_json["pre_tokenizer"]):
        raise UserError(
            "GGUF export supports only byte-level BPE tokenizers and BPE with byte fallback."
        )
    expected = inner.pre_tokenizer.pre_tokenize_str(PROBE_TEXT)
    for name, patterns in PRETOKENIZERS.items():
        steps = [Split(Regex(pattern), "isolated") for pattern in patterns]
        if (
            Sequence([*steps, ByteLevel(add_prefix_space=False, use_regex=False)]).pre_tokenize_str(
                PROBE_TEXT
            )
            == expected
        ):
            # With ignore_merges a word that is a token is not built from merges.
            ignores_merges = tokenizer_json["model"].get("ignore_merges", False)
            return "smaug-bpe" if name == "llama-bpe" and not ignores_merges else name
    raise UserError(
        "This tokenizer's pretokenizer is none of those that llama.cpp has: "
        f"{', '.join(PRETOKENIZERS)}."
    )


def has_space_prefix(tokenizer_json: dict[str, Any], *, has_chat_template: bool) -> bool:
    """Whether llama.cpp should add a space before the text and after every special token.

    A tokenizer that adds one only at the start of the text fits neither choice. Chats start with a
    special token, so for a chat model the answer is no.
    """
    steps = json.dumps([tokenizer_json["normalizer"], tokenizer_json["pre_tokenizer"]])
    return (
        '"Prepend"' in steps
        or '"prepend_scheme": "always"' in steps
        or ('"prepend_scheme": "first"' in steps and not has_chat_template)
    )


def add_special_tokens(writer: gguf.GGUFWriter, tokenizer: Any, *, rows: int) -> None:
    for kind, add_token_id in (
        ("bos", writer.add_bos_token_id),
        ("eos", writer.add_eos_token_id),
        ("unk", writer.add_unk_token_id),
        ("pad", writer.add_pad_token_id),
    ):
        id_ = getattr(tokenizer, f"{kind}_token_id")
        if id_ is not None and id_ < rows:  # transformers may add tokens without a row
            add_token_id(id_)
    with_special = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(
        tokenizer.bos_token_id is not None and with_special[0] == tokenizer.bos_token_id
    )
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = [{"name": name, "template": text} for name, text in template.items()]
    if template:
        writer.add_chat_template(template)
