"""Detects a file's format from its first bytes and its name. No row formats and no ORM here."""

from __future__ import annotations

import codecs
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from training.errors import UserError

FORMATS = {
    "jsonl": "JSON Lines",
    "json": "JSON",
    "csv": "CSV",
    "parquet": "Parquet",
    "text": "plain text",
}
EXTENSION_FORMATS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".txt": "text",
    ".md": "text",
}
DELIMITERS = {",": "comma", "\t": "tab", ";": "semicolon", "|": "pipe"}
UNITS = {"paragraph": "a paragraph", "line": "a line"}
HEAD_BYTES = 65_536
BOMS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
MAGIC_BYTES = (
    (b"PK\x03\x04", "a zip or Excel file"),
    (b"%PDF", "a PDF"),
    (b"\x89PNG", "a picture"),
    (b"BZh", "a bzip2 file"),
    (b"\xfd7zXZ", "an xz file"),
    (b"\x28\xb5\x2f\xfd", "a Zstandard file"),
    (b"\x80\x04", "a Python pickle"),
)


class BadFile(UserError):
    """The file cannot be read as data."""


@dataclass(frozen=True)
class Format:
    kind: str
    zipped: bool = False
    delimiter: str = ","
    header: bool = True
    unit: str = "paragraph"  # how plain text is split into rows

    @property
    def location_unit(self) -> str:
        """The unit of a record's location; columnar files have rows instead of lines."""
        return "row" if self.kind == "parquet" else "line"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def detect_format(path: Path, name: str) -> Format:
    """Detect the format of a file from its content, and from its name if the content is ambiguous.

    Raises:
        BadFile: empty, binary, or in another encoding; the message names it.
    """
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    zipped = head.startswith(b"\x1f\x8b")
    if zipped:
        head = decompress_head(head)
    stem = name.lower().removesuffix(".gz")
    if not head.removeprefix(codecs.BOM_UTF8).strip():
        raise BadFile("The file is empty.", field="file")
    if head.startswith(b"PAR1"):
        if zipped:
            raise BadFile(
                "This is a gzipped Parquet file. Parquet is already compressed; upload it without "
                "gzip.",
                field="file",
            )
        return Format("parquet")
    return detect_text_format(decode_text_head(head), stem, zipped)


def decompress_head(head: bytes) -> bytes:
    try:
        return zlib.decompressobj(wbits=31).decompress(head, HEAD_BYTES)
    except zlib.error as error:
        raise BadFile("The gzip file is corrupt.", field="file") from error


def decode_text_head(head: bytes) -> str:
    """The first bytes as text.

    Raises:
        BadFile: they are binary, or in another encoding than UTF-8.
    """
    for bom, encoding in BOMS:
        if head.startswith(bom):
            raise BadFile(f"The file is encoded as {encoding}; save it as UTF-8.", field="file")
    for magic, description in MAGIC_BYTES:
        if head.startswith(magic):
            raise BadFile(
                f"The file is {description}. Supported formats: {', '.join(FORMATS.values())}.",
                field="file",
            )
    if b"\0" in head:
        raise BadFile(
            f"The file is binary (zero byte at position {head.index(0) + 1}), not text or Parquet.",
            field="file",
        )
    text = head.decode("utf-8-sig", errors="surrogateescape")
    bad_bytes = sum("\udc80" <= c <= "\udcff" for c in text[:-4])
    if bad_bytes > len(text) / 10:
        raise BadFile("The file is not UTF-8 text; save it as UTF-8.", field="file")
    return text


def detect_text_format(head: str, name: str, zipped: bool) -> Format:
    extension_format = EXTENSION_FORMATS.get(Path(name).suffix, "")
    first = head.lstrip()[:1]
    if extension_format == "csv" or (
        not extension_format and first not in ("{", "[") and detect_delimiter(head, name)
    ):
        return Format("csv", zipped, detect_delimiter(head, name) or ",")
    if extension_format == "text" or (not extension_format and first not in ("{", "[")):
        return Format("text", zipped)
    if extension_format == "json" and first == "{" and head.split("\n", 1)[0].strip() != "{":
        return Format("jsonl", zipped)  # named .json, but one object per line
    return Format("json" if first == "[" or extension_format == "json" else "jsonl", zipped)


def detect_delimiter(head: str, name: str) -> str:
    """The delimiter that occurs equally often in the first lines; empty if none does. (csv.Sniffer
    needs hours for some lines.)
    """
    if name.endswith(".tsv"):
        return "\t"
    lines = [line for line in head.splitlines()[:6] if line.strip()]
    lines = lines[:-1] if len(lines) > 2 else lines  # the last line may be incomplete
    counts = {sign: [line.count(sign) for line in lines] for sign in DELIMITERS}
    consistent = {
        sign: line_counts[0]
        for sign, line_counts in counts.items()
        if line_counts and line_counts[0] and min(line_counts) >= line_counts[0]
    }
    candidates = {
        sign: line_counts[0]
        for sign, line_counts in counts.items()
        if line_counts and line_counts[0]
    }
    best = consistent or (candidates if name.endswith(".csv") else {})
    return max(best, key=lambda sign: best[sign]) if best else ""
