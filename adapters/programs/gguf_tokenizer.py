"""Write a tokenizer of transformers into a GGUF, so that llama.cpp cuts text into the same tokens.

Two kinds: byte-level BPE (GPT-2, Llama 3, Qwen, SmolLM) and SentencePiece's BPE with `▁` for spaces
(Llama 2, Mistral, Gemma). llama.cpp cannot read a rule for cutting words from the file; it has some
built in, by name. The name is found by behaviour:
the tokenizer and each rule cut a text in which all of them differ.
"""

from __future__ import annotations

import json
from typing import Any

import gguf
from gguf import TokenType

from training.errors import UserError

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
TAIL = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+%s|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*%s"
)
LLAMA3 = rf"{SHORT}|{WORDS}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*{TAIL}"
CUTS = {  # llama.cpp's name: the patterns by which it cuts, one after another
    "gpt-2": [GPT2],
    "smollm": [r"\p{N}", GPT2],
    "llama-bpe": [LLAMA3],
    "qwen2": [rf"{SHORT}|{WORDS}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*{TAIL}"],
    "qwen35": [
        rf"{SHORT}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| "
        rf"?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*{TAIL}"
    ],
    "gpt-4o": [
        CASED % (f"{SHORT}?", f"{SHORT}?")
        + rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*{TAIL}"
    ],
    "tekken": [CASED % ("", "") + rf"|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*{TAIL}"],
}
PROBE = (
    "Don't DON'T we'LL  it's'tis 1 22 333 4444 55555 x1y 3.14 ½²\n\n  \n\tHTTPServer camelCase "
    "ÉcoleÉtÉ naïve e\u0301te\u0301 日本語テキスト 한국어 नमस्ते 🦜🦜 #!?/ \r\n//\n ,,\n( a)/\n_b_ "
    "\u00a0\u2003 z   \n"
)


def add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Any, *, rows: int) -> None:
    """`rows` are those of the embedding: llama.cpp wants a token for each, so spare ones get a name
    nobody writes.
    """
    inner: Any = tokenizer.backend_tokenizer
    told = json.loads(inner.to_str())
    model = told["model"]
    if model["type"] != "BPE" or not model.get("merges"):
        raise UserError(
            f"A tokenizer of the kind {model['type']} is not exported to GGUF, only BPE with "
            "merges."
        )
    if len(model["vocab"]) > rows:
        raise UserError(
            f"The tokenizer has {len(model['vocab'])} tokens, but the model's embedding only "
            f"{rows} rows."
        )
    names = {id_: text for text, id_ in inner.get_vocab(with_added_tokens=True).items()}
    pieces = model.get("byte_fallback", False)
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
    writer.add_token_list([names.get(id_, f"[PAD{id_}]") for id_ in range(rows)])
    writer.add_token_types(
        token_types(names, inner, rows=rows, unknown=model.get("unk_token") if pieces else None)
    )
    if pieces:
        writer.add_tokenizer_model("llama")
        writer.add_token_scores(scores(names, merges, rows=rows))
        writer.add_add_space_prefix(prefixes_space(told, chats=bool(tokenizer.chat_template)))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(name_of_cuts(inner, told))
        writer.add_token_merges(merges)
        writer.add_add_space_prefix(False)
    add_special(writer, tokenizer, rows=rows)


def token_types(
    names: dict[int, str], inner: Any, *, rows: int, unknown: str | None
) -> list[TokenType]:
    added = inner.get_added_tokens_decoder()
    types = []
    for id_ in range(rows):
        text = names.get(id_)
        if text is None:
            types.append(TokenType.UNUSED)
        elif unknown is not None and text == unknown:
            types.append(TokenType.UNKNOWN)
        elif id_ in added:
            types.append(TokenType.CONTROL if added[id_].special else TokenType.USER_DEFINED)
        elif unknown is not None and len(text) == len("<0x00>") and text.startswith("<0x"):
            types.append(TokenType.BYTE)
        else:
            types.append(TokenType.NORMAL)
    return types


def scores(names: dict[int, str], merges: list[str], *, rows: int) -> list[float]:
    """SentencePiece joins the pair with the highest score; BPE the one whose merge comes first."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault(merge.replace(" ", ""), rank)
    return [-float(ranks.get(names.get(id_, ""), len(merges))) for id_ in range(rows)]


def name_of_cuts(inner: Any, told: dict[str, Any]) -> str:
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

    if (told["normalizer"] or {"type": "NFC"})["type"] != "NFC" or "ByteLevel" not in json.dumps(
        told["pre_tokenizer"]
    ):
        raise UserError(
            "Only byte-level BPE tokenizers and those with byte fallback are exported to GGUF."
        )
    wanted = inner.pre_tokenizer.pre_tokenize_str(PROBE)
    for name, patterns in CUTS.items():
        steps = [Split(Regex(pattern), "isolated") for pattern in patterns]
        if (
            Sequence([*steps, ByteLevel(add_prefix_space=False, use_regex=False)]).pre_tokenize_str(
                PROBE
            )
            == wanted
        ):
            # A word that is a token is then not built from merges
            whole_words = told["model"].get("ignore_merges", False)
            return "smaug-bpe" if name == "llama-bpe" and not whole_words else name
    raise UserError(
        "This tokenizer cuts words by a rule that llama.cpp does not have under a name known here."
    )


def prefixes_space(told: dict[str, Any], *, chats: bool) -> bool:
    """llama.cpp puts a space before the text and again after every special token, or nowhere.

    A tokenizer that puts one only at the very beginning is neither: chats begin with a special
    token, so there it is nowhere.
    """
    steps = json.dumps([told["normalizer"], told["pre_tokenizer"]])
    return (
        '"Prepend"' in steps
        or '"prepend_scheme": "always"' in steps
        or ('"prepend_scheme": "first"' in steps and not chats)
    )


def add_special(writer: gguf.GGUFWriter, tokenizer: Any, *, rows: int) -> None:
    for kind, add in (
        ("bos", writer.add_bos_token_id),
        ("eos", writer.add_eos_token_id),
        ("unk", writer.add_unk_token_id),
        ("pad", writer.add_pad_token_id),
    ):
        id_ = getattr(tokenizer, f"{kind}_token_id")
        if id_ is not None and id_ < rows:  # transformers adds some that the model has no row for
            add(id_)
    with_special = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(
        tokenizer.bos_token_id is not None and with_special[0] == tokenizer.bos_token_id
    )
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = [{"name": name, "template": text} for name, text in template.items()]
    if template:
        writer.add_chat_template(template)
