"""Read and verify the header of an untrusted safetensors file. It reads no tensors and needs no
torch.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any, NamedTuple

from training.errors import UserError

# Hugging Face's limit is 100 MB. 20 MB are enough for more than 100,000 tensors in a file.
MAX_HEADER_BYTES = 20_000_000
# All dtypes of safetensors 0.8
DTYPE_BITS = {
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "U16": 16,
    "I16": 16,
    "F16": 16,
    "BF16": 16,
    "U32": 32,
    "I32": 32,
    "F32": 32,
    "U64": 64,
    "I64": 64,
    "F64": 64,
    "C64": 64,
}


class InvalidHeader(UserError):
    """The file is not a complete and valid safetensors file."""


class TensorInfo(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    begin: int  # byte offset from the end of the header
    end: int


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The dtype, shape and offsets of every tensor.

    Raises:
        InvalidHeader: the length is wrong, tensors overlap or are outside the file, or a dtype or
            shape is invalid.
    """
    entries, length = read_entries(path)
    tensors = {name: parse_entry(name, entry, path.name) for name, entry in entries.items()}
    expected = 0
    for begin, end in sorted((tensor.begin, tensor.end) for tensor in tensors.values()):
        if begin != expected:
            raise InvalidHeader(
                f"Tensors in {path.name} overlap or have gaps between them.", code="bad_offsets"
            )
        expected = end
    if not tensors or 8 + length + expected != path.stat().st_size:
        raise InvalidHeader(
            f"{path.name} is shorter or longer than its header says.", code="bad_offsets"
        )
    return tensors


def read_entries(path: Path) -> tuple[dict[str, Any], int]:
    """The entries of the header and its length in bytes."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = struct.unpack("<Q", file.read(8))[0] if size >= 8 else 2**63
        if length > min(MAX_HEADER_BYTES, size - 8):
            raise InvalidHeader(
                f"{path.name} is not a safetensors file: its header would have {length:,} bytes.",
                code="broken_header",
            )
        try:
            header = json.loads(file.read(length).decode(), object_pairs_hook=check_unique_keys)
        except (ValueError, RecursionError) as error:
            raise InvalidHeader(
                f"{path.name} is not a safetensors file: {str(error)[:100]}.",
                code="broken_header",
            ) from error
    if not isinstance(header, dict):
        raise InvalidHeader(f"{path.name} is not a safetensors file: its header is not an object.")
    return {name: entry for name, entry in header.items() if name != "__metadata__"}, length


def parse_entry(name: str, entry: Any, file_name: str) -> TensorInfo:
    """Parse an entry and check that its bytes match its shape. Raises InvalidHeader."""
    try:
        begin, end = entry["data_offsets"]
        dtype, shape = entry["dtype"], tuple(entry["shape"])
        bits = DTYPE_BITS[dtype]
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidHeader(
            f"The header entry of tensor {name[:80]!r} in {file_name} is invalid.",
            code="broken_entry",
        ) from error
    is_valid = all(type(number) is int and number >= 0 for number in (begin, end, *shape))
    if not is_valid or not has_elements(shape, 8 * (end - begin), bits):
        raise InvalidHeader(
            f"The size of tensor {name[:80]!r} in {file_name} does not match its shape.",
            code="wrong_size",
        )
    return TensorInfo(dtype, shape, begin, end)


def has_elements(shape: tuple[int, ...], total_bits: int, bits: int) -> bool:
    """Whether the elements of this shape fill these bits exactly. The product stops early, because
    a malicious shape could take hours to multiply.
    """
    if 0 in shape:
        return total_bits == 0
    needed = bits
    for size in shape:
        needed *= size
        if needed > total_bits:
            return False
    return needed == total_bits


def check_unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = dict(pairs)
    if len(keys) < len(pairs):
        raise ValueError("it has a duplicate key")
    return keys
