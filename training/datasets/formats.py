"""Detects a file's format from its first bytes and its name. No row formats and no ORM here."""

from __future__ import annotations

import codecs
import gzip
import json
import re
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from training.datasets.column_mapping import PART_ALIASES
from training.datasets.errors import BadFile
from training.datasets.rows import MAX_ROW_BYTES

FORMATS = {
    "jsonl": "JSON Lines",
    "json": "JSON",
    "csv": "CSV",
    "parquet": "Parquet",
    "arrow": "Arrow",
    "text": "plain text",
}
COLUMNAR_FORMATS = ("parquet", "arrow")
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
# The codecs drop the BOM. UTF-32's begins with UTF-16's, so it comes first.
BOMS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
ENCODINGS_WITH_ZEROS = ("utf-32-le", "utf-32-be", "utf-16-le", "utf-16-be")
MIN_ASCII_SHARE = 0.05  # of decoded text; JSON and CSV have at least their punctuation
GZIP_MAGIC, ZIP_MAGIC, PARQUET_MAGIC = b"\x1f\x8b", b"PK\x03\x04", b"PAR1"
# An Arrow file, and the continuation mark of an Arrow stream, which `save_to_disk` writes
ARROW_MAGICS = (b"ARROW1", b"\xff\xff\xff\xff")
MAGIC_BYTES = (
    (ZIP_MAGIC, "a zip or Excel file"),
    (b"%PDF", "a PDF"),
    (b"\x89PNG", "a picture"),
    (b"BZh", "a bzip2 file"),
    (b"\xfd7zXZ", "an xz file"),
    (b"\x28\xb5\x2f\xfd", "a Zstandard file"),
    *((bytes((0x80, protocol)), "a Python pickle") for protocol in range(2, 6)),
)
LINE_END = re.compile("\r\n|\r|\n")
EXCEL_SEPARATOR = re.compile('"?sep=(.)"?\r?\n', re.IGNORECASE)  # the first line that Excel writes


@dataclass(frozen=True)
class Format:
    kind: str
    zipped: bool = False  # gzip
    encoding: str = "utf-8"
    delimiter: str = ","
    header: bool = True
    unit: str = "paragraph"  # how plain text is split into rows
    has_cr_lines: bool = False  # lines end with a carriage return alone

    @property
    def location_unit(self) -> str:
        """The unit of a record's location; columnar files have rows instead of lines."""
        return "row" if self.kind in COLUMNAR_FORMATS else "line"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def open_file(path: Path, zipped: bool) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path, "rb")) if zipped else path.open("rb")


def detect_format(path: Path, name: str) -> Format:
    """Detect the format of a file from its content, and from its name if the content is ambiguous.

    Raises:
        BadFile: empty, binary, or in another encoding; the message names it.
    """
    with path.open("rb") as file:
        zipped = file.read(2) == GZIP_MAGIC
    head = read_head(path, zipped, HEAD_BYTES)
    stem = name.lower().removesuffix(".gz")
    if not head.removeprefix(codecs.BOM_UTF8).strip():
        raise BadFile("The file is empty.", field="file")
    for magics, kind in (((PARQUET_MAGIC,), "parquet"), (ARROW_MAGICS, "arrow")):
        if head.startswith(magics):
            if zipped:
                raise BadFile(
                    f"This is a gzipped {FORMATS[kind]} file. Upload it without gzip.",
                    field="file",
                )
            return Format(kind)
    encoding = detect_encoding(head)
    text = decode_head(head, encoding)
    if text.lstrip()[:1] in ("{", "["):  # the first row may be longer than the head
        text = decode_head(read_head(path, zipped, MAX_ROW_BYTES), encoding)
    has_cr_lines = ends_with_cr(text)
    if has_cr_lines:
        text = text.replace("\r", "\n")
    return detect_text_format(
        text, stem, zipped=zipped, encoding=encoding, has_cr_lines=has_cr_lines
    )


def ends_with_cr(text: str) -> bool:
    """Whether lines end with a carriage return alone. Quoted cells of such a file may hold
    newlines.
    """
    first = LINE_END.search(text)
    is_cr = first is not None and first[0] == "\r" and "\r\n" not in text
    return is_cr and text.count("\r") > text.count("\n")


def read_head(path: Path, zipped: bool, size: int) -> bytes:
    """The first bytes of a file, unpacked; fewer than `size` if the rest cannot be read."""
    head = bytearray()
    with open_file(path, zipped) as file:
        try:
            while len(head) < size and (chunk := file.read1(size - len(head))):  # type: ignore[attr-defined]
                head += chunk
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            if not head:
                raise BadFile("The gzip file is corrupt.", field="file") from error
    return bytes(head)


def detect_encoding(head: bytes) -> str:
    """The encoding of a text file.

    Raises:
        BadFile: the file is binary.
    """
    for bom, encoding in BOMS:
        if head.startswith(bom):
            return encoding
    for magic, description in MAGIC_BYTES:
        if head.startswith(magic):
            raise BadFile(
                f"The file is {description}. Supported formats: {', '.join(FORMATS.values())}.",
                field="file",
            )
    if b"\0" not in head:
        return "utf-8"
    whole = head[: len(head) // 4 * 4] or head
    for encoding in ENCODINGS_WITH_ZEROS:
        text = whole.decode(encoding, errors="replace")[:-1]
        readable = sum(c.isascii() and (c.isprintable() or c in "\t\r\n") for c in text)
        if "\0" not in text and "\ufffd" not in text and readable > MIN_ASCII_SHARE * len(text):
            return encoding
    raise BadFile(
        f"The file is binary (zero byte at position {head.index(0) + 1}), not text, Parquet or "
        "Arrow.",
        field="file",
    )


def decode_head(head: bytes, encoding: str) -> str:
    """The first bytes as text.

    Raises:
        BadFile: they are not text in the encoding.
    """
    if encoding != "utf-8":
        return head.decode(encoding, errors="replace")
    text = head.decode("utf-8-sig", errors="surrogateescape")
    bad_bytes = sum("\udc80" <= c <= "\udcff" for c in text[:HEAD_BYTES])
    if bad_bytes > max(4, len(text) / 10):
        raise BadFile("The file is not UTF-8 text; save it as UTF-8.", field="file")
    return text


def detect_text_format(head: str, name: str, **options: Any) -> Format:
    """The format of a text; `options` are further fields of the format."""
    extension_format = EXTENSION_FORMATS.get(Path(name).suffix, "")
    json_kind = detect_json_kind(head)
    is_json_name = extension_format in ("json", "jsonl")
    if json_kind and (is_json_name or not extension_format or begins_with_json_row(head)):
        return Format(json_kind, **options)
    delimiter = detect_delimiter(head, name)
    is_table = delimiter and (not extension_format or has_known_header(head, delimiter))
    if extension_format == "csv" or is_table:
        return Format("csv", delimiter=delimiter or ",", **options)
    if is_json_name:
        return Format(extension_format, **options)
    return Format("text", **options)


def has_known_header(head: str, delimiter: str) -> bool:
    """Whether a text file is a table: its first line names a prompt and an answer, or messages, as
    in Excel's "Text (tab delimited)".
    """
    cells = head.lstrip("\ufeff").split("\n", 1)[0].split(delimiter)
    names = {cell.strip().strip('"').lower() for cell in cells}
    has_pair = names & {*PART_ALIASES["prompt"]} and names & {*PART_ALIASES["completion"]}
    return bool(has_pair or names & {"messages", "conversations"})


def begins_with_json_row(head: str) -> bool:
    """Whether a text begins with a JSON object, or an array of objects or arrays, whatever the file
    is called.
    """
    try:
        value, _ = json.JSONDecoder().raw_decode(head.lstrip())
    except (ValueError, RecursionError):
        return False
    first = value[0] if isinstance(value, list) and value else value
    return bool(value) and isinstance(first, dict | list)


def parse_line(line: str) -> Any:
    """The JSON value of a line, or None. A comma may follow it."""
    try:
        return json.loads(line.strip().removesuffix(","))
    except (ValueError, RecursionError):
        return None


def detect_json_kind(head: str) -> str:
    """`jsonl` if each line is one value, `json` for any other JSON, or an empty text.

    A file of one line is `json`, whose reader also takes objects and arrays one after another.
    """
    if head.lstrip()[:1] not in ("{", "["):
        return ""
    lines = [line.strip() for line in head.strip().split("\n", 50)[:50] if line.strip()]
    if len(lines) < 2:
        return "json"
    first = lines[0].removesuffix(",")
    if parse_line(first) is not None:
        return "jsonl"
    # The first line may be the only bad one: then its brackets are balanced, as in other lines.
    is_balanced = first.startswith("{") and all(
        first.count(opening) == first.count(closing) for opening, closing in ("{}", "[]")
    )
    return "jsonl" if is_balanced and lines[1][:1] in ("{", "[") else "json"


def detect_delimiter(head: str, name: str) -> str:
    """The delimiter that occurs equally often in the first lines; empty if none does. (csv.Sniffer
    needs hours for some lines.)
    """
    if separator := EXCEL_SEPARATOR.match(head):
        return separator[1] if separator[1] in DELIMITERS else ""
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
