"""A safetensors file's header, believed only where every claim in it holds. It reads no tensor and
knows no torch.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from training.errors import UserError

MOST_HEADER_BYTES = 20_000_000
DTYPE_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}


def header_of(path: Path) -> dict[str, list[int]]:
    """Name and shape of every tensor.

    Raises:
        UserError: a header that lies about its length, places that overlap or lie outside, odd
            types or shapes.
    """
    entries, length = read_entries(path)
    spans, shapes = [], {}
    for name, entry in entries.items():
        begin, end, shape = checked(name, entry, path.name)
        spans.append((begin, end))
        shapes[name] = shape
    expected = 0
    for begin, end in sorted(spans):
        if begin != expected:
            raise UserError(f"Tensors in {path.name} overlap or leave holes.", field="file")
        expected = end
    if not shapes or 8 + length + expected != path.stat().st_size:
        raise UserError(f"{path.name} is cut off or has more than its header tells.", field="file")
    return shapes


def read_entries(path: Path) -> tuple[dict[str, Any], int]:
    """The header's entries, and its length in bytes."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = struct.unpack("<Q", file.read(8))[0] if size >= 8 else 2**63
        if length > min(MOST_HEADER_BYTES, size - 8):
            raise UserError(
                f"{path.name} is no safetensors file: its header claims {length:,} bytes.",
                field="file",
            )
        try:
            header = json.loads(file.read(length), object_pairs_hook=once)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{path.name} is no safetensors file: {str(error)[:100]}.", field="file"
            ) from error
    if not isinstance(header, dict):
        raise UserError(
            f"{path.name} is no safetensors file: its header is no object.", field="file"
        )
    return {name: entry for name, entry in header.items() if name != "__metadata__"}, length


def checked(name: str, entry: Any, file: str) -> tuple[int, int, list[int]]:
    """Begin, end and shape of a tensor whose bytes are as many as its shape needs."""
    try:
        (begin, end), shape, width = (
            entry["data_offsets"],
            entry["shape"],
            DTYPE_BYTES[entry["dtype"]],
        )
        whole = all(type(number) is int and number >= 0 for number in (begin, end, *shape))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"The tensor {name[:80]!r} in {file} is not described as safetensors has it.",
            field="file",
        ) from error
    if not whole or end - begin != product(shape) * width:
        raise UserError(
            f"The tensor {name[:80]!r} in {file} has other bytes than its shape needs.",
            field="file",
        )
    return begin, end, list(shape)


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("a name stands twice in it")
    return made


def product(shape: list[int]) -> int:
    total = 1
    for number in shape:
        total *= number
    return total
