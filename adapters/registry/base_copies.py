"""Copies of base weights in an adapter's file. PEFT saves them when an adapter is on the embeddings
or the output head; equal ones are removed, others would change the base.

It reads the files in pieces with numpy; torch is not loaded.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import struct
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from adapters.registry.base_shapes import find_weight_name
from adapters.registry.import_checks import TENSOR_PREFIX
from training.catalog.safetensors_header import TensorInfo, read_header
from training.errors import UserError

COPY_PATTERN = re.compile(
    r"(?P<module>[\w.]*?\w)(?:\.base_layer|\.original_module)?\.(?P<part>weight|bias)"
)
ADAPTER_PART_PATTERN = re.compile(r"\.(lora_|ia3_|bottleneck_|modules_to_save\b)")
NUMPY_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
CHUNK_VALUES = 2**20


class StoredTensor(NamedTuple):
    """A tensor and the file that it is in."""

    path: Path
    info: TensorInfo


def read_tensors(path: Path) -> dict[str, StoredTensor]:
    """Raises InvalidHeader: the file is not a valid safetensors file."""
    return {name: StoredTensor(path, info) for name, info in read_header(path).items()}


def find_base_copies(
    tensors: Mapping[str, StoredTensor], base: Mapping[str, StoredTensor], base_name: str
) -> set[str]:
    """The names of the tensors that are copies of the base's.

    Raises:
        UserError: a copy differs from the base's weight.
    """
    copies = set()
    for name, tensor in tensors.items():
        original = find_original(name, base)
        if original is None:
            continue
        if tensor.info.shape != original.info.shape:
            raise UserError(
                f"The file has its own {name[:120]} of shape {list(tensor.info.shape)}, but that "
                f"of {base_name} has shape {list(original.info.shape)}: tokens were added. SnapML "
                "does not support this; merge the adapter into its base with PEFT's "
                "`merge_and_unload` and register the result as a model instead.",
                field="file",
                code="unknown_tensor",
            )
        if not are_equal(tensor, original):
            raise UserError(
                f"The file has its own {name[:120]}, which differs from that of {base_name} and "
                "would overwrite it. Choose the base model it was trained on, or merge the adapter "
                "with PEFT's `merge_and_unload` and register the result as a model.",
                field="file",
                code="unknown_tensor",
            )
        copies.add(name)
    return copies


def find_original(name: str, base: Mapping[str, StoredTensor]) -> StoredTensor | None:
    """The base's weight that this tensor is a copy of."""
    match = COPY_PATTERN.fullmatch(name.removeprefix(TENSOR_PREFIX))
    if match is None or ADAPTER_PART_PATTERN.search(name):
        return None
    weight_name = find_weight_name(match["module"], base.keys(), match["part"])
    return base[weight_name] if weight_name else None


def are_equal(tensor: StoredTensor, original: StoredTensor) -> bool:
    """Whether the values are equal in the less precise of the two dtypes."""
    dtypes = (tensor.info.dtype, original.info.dtype)
    if not all(dtype in NUMPY_DTYPES for dtype in dtypes):
        return False
    equal_in = set(dtypes)
    for start in range(0, math.prod(tensor.info.shape), CHUNK_VALUES):
        mine, other = read_values(tensor, start), read_values(original, start)
        equal_in = {
            dtype
            for dtype in equal_in
            if np.array_equal(round_to(mine, dtype), round_to(other, dtype))
        }
    return bool(equal_in)


def read_values(tensor: StoredTensor, start: int) -> NDArray[Any]:
    """At most CHUNK_VALUES values from `start` on, as float64 or float32."""
    dtype = np.dtype(NUMPY_DTYPES[tensor.info.dtype])
    count = min(CHUNK_VALUES, math.prod(tensor.info.shape) - start)
    with tensor.path.open("rb") as file:
        file.seek(get_data_start(tensor.path) + tensor.info.begin + start * dtype.itemsize)
        values = np.frombuffer(file.read(count * dtype.itemsize), dtype)
    if tensor.info.dtype == "BF16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values if tensor.info.dtype == "F64" else values.astype(np.float32)


def round_to(values: NDArray[Any], dtype: str) -> NDArray[Any]:
    """The values as this dtype holds them; bfloat16 rounds to the nearest even number."""
    if dtype == "F64":
        return values.astype(np.float64)
    single = values.astype(np.float32)
    if dtype == "BF16":
        bits = single.view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32)
    with np.errstate(over="ignore"):
        return single.astype(np.float16) if dtype == "F16" else single


def get_data_start(path: Path) -> int:
    """Where the tensors of a safetensors file start: after the header and its length."""
    with path.open("rb") as file:
        return 8 + int(struct.unpack("<Q", file.read(8))[0])


def remove_tensors(path: Path, names: Collection[str]) -> None:
    """Write a safetensors file anew without these tensors."""
    retained = {name: info for name, info in read_header(path).items() if name not in names}
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, info in retained.items():
        size = info.end - info.begin
        offsets = [position, position + size]
        entries[name] = {"dtype": info.dtype, "shape": info.shape, "data_offsets": offsets}
        position += size
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    data_start = get_data_start(path)
    new_path = path.with_suffix(".new")
    with path.open("rb") as source, new_path.open("xb") as target:
        target.write(struct.pack("<Q", len(header)) + header)
        for info in retained.values():
            source.seek(data_start + info.begin)
            remaining = info.end - info.begin
            while remaining:
                piece = source.read(min(remaining, 2**20))
                target.write(piece)
                remaining -= len(piece)
    shutil.move(new_path, path)
