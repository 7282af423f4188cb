"""Files for benchmarks/abuse.py that are small to send and large to read."""

from __future__ import annotations

import io
import json
import struct

MAX_SHAPE = 2**32


def build_nested_json() -> bytes:
    """450,000 numbers below a path of 4 kB."""
    depth = 98
    return b"".join(
        [b'{"' + b"k" * 40 + b'":'] * depth + [b"[" + b"0," * 450_000 + b"0]"] + [b"}" * depth]
    )


def build_zip_of_many_entries(entries: int) -> bytes:
    """A zip with `entries` empty files and a ZIP64 end (APPNOTE 4.3.14), of about 60 bytes each."""
    local = struct.pack("<4s5H3I2H", b"PK\x03\x04", 20, 0, 0, 0, 0, 0, 0, 0, 1, 0) + b"a"
    out = io.BytesIO()
    out.write(local)
    for number in range(entries):
        name = b"%d" % number
        fields = (45, 20, 0, 0, 0, 0, 0, 0, 0, len(name), 0, 0, 0, 0, 0, 0)
        out.write(struct.pack("<4s6H3I5H2I", b"PK\x01\x02", *fields) + name)
    size, start = out.tell() - len(local), len(local)
    end = out.tell()
    out.write(
        struct.pack("<4sQ2H2I4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, entries, entries, size, start)
    )
    out.write(struct.pack("<4sIQI", b"PK\x06\x07", 0, end, 1))
    out.write(struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 65535, 65535, 2**32 - 1, 2**32 - 1, 0))
    return out.getvalue()


def build_large_header(tensors: int) -> bytes:
    """A safetensors file whose header lists `tensors` tensors without content."""
    shape = {"dtype": "F32", "shape": [MAX_SHAPE, MAX_SHAPE, 0], "data_offsets": [0, 0]}
    header = json.dumps({f"layer.{number}.lora_A.weight": shape for number in range(tensors)})
    return struct.pack("<Q", len(header)) + header.encode()


def build_small_parquet() -> bytes:
    """A row of 100 MB of equal bytes in a few kB."""
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"prompt": ["x" * 100_000_000], "completion": ["y"]})
    out = io.BytesIO()
    pyarrow.parquet.write_table(table, out, compression="zstd")
    return out.getvalue()
