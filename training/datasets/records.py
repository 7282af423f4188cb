"""A file -> its records, whatever its format, in memory that does not grow with it. It knows no
forms and no ORM.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from training.datasets.formats import BadFile, Format
from training.datasets.json_items import json_items, loads
from training.datasets.rows import MAX_ROW_BYTES, BadRow, check_text
from training.formatting import format_binary_bytes

MAX_COLUMNS = 1_000
MAX_ROW_GROUP_BYTES = 512 * 2**20
Found = tuple[int, dict[str, Any] | BadRow]

# Below what is read of a line, so that a longer field is told as such
csv.field_size_limit(MAX_ROW_BYTES - 4096)


def opened(path: Path, zipped: bool) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path, "rb")) if zipped else path.open("rb")


def records(path: Path, form: Format, *, most_bytes: int) -> Iterator[Found]:
    """Every record with its line (or row) number; a broken one is a BadRow in its place.

    Raises:
        BadFile: nothing after this point can be read.
    """
    if form.kind == "parquet":
        yield from parquet_records(path, most_bytes)
        return
    number = 0
    with opened(path, form.zipped) as raw:
        file = Measured(raw, most_bytes)
        try:
            for number, value in READERS[form.kind](file, form):
                yield number, value
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise BadFile(
                f"The gzip file is cut off or damaged after line {number:,}.", field="file"
            ) from error


class Measured(io.RawIOBase):
    """A file that unpacks to no more than `most` bytes: a gzip bomb ends in a sentence."""

    def __init__(self, file: BinaryIO, most: int) -> None:
        self.file, self.left = file, most

    def readable(self) -> bool:
        return True

    def readline(self, size: int | None = -1) -> bytes:
        return self.counted(self.file.readline(size if size is not None else -1))

    def read(self, size: int | None = -1) -> bytes:
        return self.counted(self.file.read(size if size is not None else -1))

    def counted(self, piece: bytes) -> bytes:
        self.left -= len(piece)
        if self.left < 0:
            raise too_much()
        return piece


def too_much() -> BadFile:
    return BadFile("The file unpacks to more than the limit for data; split it.", field="file")


def bounded_lines(file: Any) -> Iterator[bytes]:
    """Lines of a file; of a line past the limit only its beginning, so that memory stays
    bounded.
    """
    while line := file.readline(MAX_ROW_BYTES + 1):
        rest = line
        while rest and not rest.endswith(b"\n"):
            rest = file.readline(MAX_ROW_BYTES)
        yield line


def too_long() -> BadRow:
    return BadRow(f"the row has more than {format_binary_bytes(MAX_ROW_BYTES)}; split it")


def jsonl_records(file: Any, _form: Format) -> Iterator[Found]:
    for number, line in enumerate(bounded_lines(file), start=1):
        if not line.strip():
            continue
        try:
            yield number, loads_object(line.removeprefix(codecs.BOM_UTF8) if number == 1 else line)
        except BadRow as bad:
            yield number, bad


def loads_object(line: bytes) -> dict[str, Any]:
    if len(line) > MAX_ROW_BYTES:
        raise too_long()
    try:
        value = loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadRow(
            f"byte {error.start + 1} is not UTF-8; save the file as UTF-8", group="not UTF-8"
        ) from error
    if not isinstance(value, dict):
        raise BadRow("expected a JSON object")
    return value


class CsvLines:
    """Lines as text for csv.reader; notes when one was longer than a row may be."""

    def __init__(self, file: Any) -> None:
        self.lines, self.first, self.cut = bounded_lines(file), True, False

    def __iter__(self) -> Iterator[str]:
        for line in self.lines:
            self.cut = self.cut or len(line) > MAX_ROW_BYTES
            yield line.decode("utf-8-sig" if self.first else "utf-8", errors="surrogateescape")
            self.first = False


def csv_records(file: Any, form: Format) -> Iterator[Found]:
    lines = CsvLines(file)
    reader = csv.reader(iter(lines), delimiter=form.delimiter, strict=True)
    header: list[str] = []
    while True:
        number, lines.cut = reader.line_num + 1, False
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield number, not_csv(error, number, reader.line_num)
            continue
        if not cells:
            continue
        if not header:
            header = read_header(cells, form)
            if form.header:
                continue
        if lines.cut:
            yield number, too_long()
        elif len(cells) != len(header):
            words = f"has {len(cells)} fields; the header has {len(header)}"
            yield number, BadRow(words, group="a row has more or fewer fields than the header")
        else:
            yield number, dict(zip(header, cells, strict=True))


def not_csv(error: csv.Error, first: int, last: int) -> BadRow:
    """A quote that is never closed swallows the lines after it: that is said."""
    swallowed = f"; lines {first:,} to {last:,} were not read" if last > first else ""
    words = f"not CSV: {error} (is a quote opened here and never closed?){swallowed}"
    return BadRow(words, group="not CSV", ends=last > first)


def read_header(cells: list[str], form: Format) -> list[str]:
    if len(cells) > MAX_COLUMNS:
        raise BadFile(
            f"The file has {len(cells):,} columns; at most {MAX_COLUMNS:,} can be read.",
            field="file",
        )
    names = [
        cell.strip() if form.header and cell.strip() else f"column {i}"
        for i, cell in enumerate(cells, start=1)
    ]
    for name in names:
        try:
            check_text(name, "header")
        except BadRow as bad:
            raise BadFile(f"The header cannot be read: {bad.message}.", field="file") from bad
        if names.count(name) > 1:
            raise BadFile(
                f"The header names the column `{name[:40]}` twice; rename one.", field="file"
            )
    return names


def text_records(file: Any, form: Format) -> Iterator[Found]:
    """Lines, or paragraphs between blank lines, as `{"text": ...}`."""
    block: list[str] = []
    begun, size = 1, 0
    for number, line in enumerate(bounded_lines(file), start=1):
        text = line.decode("utf-8-sig" if number == 1 else "utf-8", errors="surrogateescape")
        ends = form.unit == "line" or not text.strip()
        if text.strip():
            begun = begun if block else number
            size += len(line)
            if size <= MAX_ROW_BYTES:
                block.append(text)
        if ends and size:
            yield begun, too_long() if size > MAX_ROW_BYTES else {"text": "".join(block).strip()}
            block, size = [], 0
    if size:
        yield begun, too_long() if size > MAX_ROW_BYTES else {"text": "".join(block).strip()}


def parquet_records(path: Path, left: int) -> Iterator[Found]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        file = pyarrow.parquet.ParquetFile(path, buffer_size=2**20, pre_buffer=False)
        for group in range(file.metadata.num_row_groups):
            if (size := file.metadata.row_group(group).total_byte_size) > MAX_ROW_GROUP_BYTES:
                most = format_binary_bytes(MAX_ROW_GROUP_BYTES)
                raise BadFile(
                    f"Row group {group + 1} has {size / 2**20:,.0f} MiB; write groups under "
                    f"{most}.",
                    field="file",
                )
        for batch in file.iter_batches(batch_size=64, use_threads=False):
            left -= batch.nbytes
            if left < 0:
                raise too_much()
            for place in range(batch.num_rows):
                number += 1
                row = batch.slice(place, 1)  # one at a time: a small file may hold huge rows
                yield number, too_long() if row.nbytes > MAX_ROW_BYTES else row.to_pylist()[0]
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise BadFile(
            f"The Parquet file is damaged after row {number:,}: {str(error).splitlines()[0][:200]}",
            field="file",
        ) from error


READERS: dict[str, Callable[[Any, Format], Iterator[Found]]] = {
    "jsonl": jsonl_records,
    "json": lambda file, _form: json_items(file),
    "csv": csv_records,
    "text": text_records,
}
