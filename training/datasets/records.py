"""Reads the records of a file of any format in bounded memory. No row formats and no ORM here."""

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
from training.datasets.json_items import iter_json_objects, parse_json
from training.datasets.rows import MAX_ROW_BYTES, BadRow, check_text
from training.formatting import format_binary_bytes

MAX_COLUMNS = 1_000
MAX_ROW_GROUP_BYTES = 512 * 2**20
NumberedRecord = tuple[int, dict[str, Any] | BadRow]

# Below the length at which lines are truncated, so that an oversized field is reported as one
csv.field_size_limit(MAX_ROW_BYTES - 4096)


def open_file(path: Path, zipped: bool) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path, "rb")) if zipped else path.open("rb")


def iter_records(path: Path, file_format: Format, *, max_bytes: int) -> Iterator[NumberedRecord]:
    """Every record with its line or row number; a broken record is yielded as a BadRow.

    Raises:
        BadFile: the rest of the file cannot be read.
    """
    if file_format.kind == "parquet":
        yield from iter_parquet(path, max_bytes)
        return
    number = 0
    with open_file(path, file_format.zipped) as raw:
        file = LimitedFile(raw, max_bytes)
        try:
            for number, value in READERS[file_format.kind](file, file_format):
                yield number, value
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise BadFile(
                f"The gzip file is truncated or corrupt after line {number:,}.", field="file"
            ) from error


class LimitedFile(io.RawIOBase):
    """A file that yields at most `max_bytes` bytes: a gzip bomb ends in a BadFile."""

    def __init__(self, file: BinaryIO, max_bytes: int) -> None:
        self.file, self.remaining_bytes = file, max_bytes

    def readable(self) -> bool:
        return True

    def readline(self, size: int | None = -1) -> bytes:
        return self.count_chunk(self.file.readline(size if size is not None else -1))

    def read(self, size: int | None = -1) -> bytes:
        return self.count_chunk(self.file.read(size if size is not None else -1))

    def count_chunk(self, chunk: bytes) -> bytes:
        self.remaining_bytes -= len(chunk)
        if self.remaining_bytes < 0:
            raise too_large_error()
        return chunk


def too_large_error() -> BadFile:
    return BadFile(
        "The uncompressed file exceeds the size limit. Split it into smaller files.", field="file"
    )


def iter_bounded_lines(file: Any) -> Iterator[bytes]:
    """The lines of a file, each truncated to MAX_ROW_BYTES + 1, so that memory stays bounded."""
    while line := file.readline(MAX_ROW_BYTES + 1):
        rest = line
        while rest and not rest.endswith(b"\n"):
            rest = file.readline(MAX_ROW_BYTES)
        yield line


def row_too_long_error() -> BadRow:
    return BadRow(f"the row is larger than {format_binary_bytes(MAX_ROW_BYTES)}; split it")


def iter_jsonl(file: Any, _file_format: Format) -> Iterator[NumberedRecord]:
    for number, line in enumerate(iter_bounded_lines(file), start=1):
        if not line.strip():
            continue
        try:
            yield number, parse_object(line.removeprefix(codecs.BOM_UTF8) if number == 1 else line)
        except BadRow as bad:
            yield number, bad


def parse_object(line: bytes) -> dict[str, Any]:
    if len(line) > MAX_ROW_BYTES:
        raise row_too_long_error()
    try:
        value = parse_json(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadRow(
            f"byte {error.start + 1} is not UTF-8; save the file as UTF-8", group="not UTF-8"
        ) from error
    if not isinstance(value, dict):
        raise BadRow("expected a JSON object")
    return value


class CsvLines:
    """Decodes lines for csv.reader and records whether one exceeded MAX_ROW_BYTES."""

    def __init__(self, file: Any) -> None:
        self.lines, self.is_first, self.is_truncated = iter_bounded_lines(file), True, False

    def __iter__(self) -> Iterator[str]:
        for line in self.lines:
            self.is_truncated = self.is_truncated or len(line) > MAX_ROW_BYTES
            yield line.decode("utf-8-sig" if self.is_first else "utf-8", errors="surrogateescape")
            self.is_first = False


def iter_csv(file: Any, file_format: Format) -> Iterator[NumberedRecord]:
    lines = CsvLines(file)
    reader = csv.reader(iter(lines), delimiter=file_format.delimiter, strict=True)
    header: list[str] = []
    while True:
        number, lines.is_truncated = reader.line_num + 1, False
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield number, csv_problem(error, number, reader.line_num)
            continue
        if not cells:
            continue
        if not header:
            header = read_header(cells, file_format)
            if file_format.header:
                continue
        if lines.is_truncated:
            yield number, row_too_long_error()
        elif len(cells) != len(header):
            message = f"has {len(cells)} fields; the header has {len(header)}"
            yield number, BadRow(message, group="a row has more or fewer fields than the header")
        else:
            yield number, dict(zip(header, cells, strict=True))


def csv_problem(error: csv.Error, first: int, last: int) -> BadRow:
    """The problem of a CSV error. A quote that is never closed swallows the following lines, so the
    message names them.
    """
    swallowed = f"; lines {first:,} to {last:,} were not read" if last > first else ""
    message = f"not CSV: {error} (is a quote opened here and never closed?){swallowed}"
    return BadRow(message, group="not CSV", is_fatal=last > first)


def read_header(cells: list[str], file_format: Format) -> list[str]:
    if len(cells) > MAX_COLUMNS:
        raise BadFile(
            f"The file has {len(cells):,} columns; at most {MAX_COLUMNS:,} are supported.",
            field="file",
        )
    names = [
        cell.strip() if file_format.header and cell.strip() else f"column {i}"
        for i, cell in enumerate(cells, start=1)
    ]
    for name in names:
        try:
            check_text(name, "header")
        except BadRow as bad:
            raise BadFile(f"Invalid header: {bad.message}.", field="file") from bad
        if names.count(name) > 1:
            raise BadFile(
                f"The header contains the column `{name[:40]}` twice. Rename one of them.",
                field="file",
            )
    return names


def iter_text(file: Any, file_format: Format) -> Iterator[NumberedRecord]:
    """Lines, or paragraphs separated by blank lines, as `{"text": ...}`."""
    block: list[str] = []
    start_line, size = 1, 0
    for number, line in enumerate(iter_bounded_lines(file), start=1):
        text = line.decode("utf-8-sig" if number == 1 else "utf-8", errors="surrogateescape")
        ends = file_format.unit == "line" or not text.strip()
        if text.strip():
            start_line = start_line if block else number
            size += len(line)
            if size <= MAX_ROW_BYTES:
                block.append(text)
        if ends and size:
            yield (
                start_line,
                row_too_long_error() if size > MAX_ROW_BYTES else {"text": "".join(block).strip()},
            )
            block, size = [], 0
    if size:
        yield (
            start_line,
            row_too_long_error() if size > MAX_ROW_BYTES else {"text": "".join(block).strip()},
        )


def iter_parquet(path: Path, remaining_bytes: int) -> Iterator[NumberedRecord]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        file = pyarrow.parquet.ParquetFile(path, buffer_size=2**20, pre_buffer=False)
        for group in range(file.metadata.num_row_groups):
            if (size := file.metadata.row_group(group).total_byte_size) > MAX_ROW_GROUP_BYTES:
                limit = format_binary_bytes(MAX_ROW_GROUP_BYTES)
                raise BadFile(
                    f"Row group {group + 1} has {size / 2**20:,.0f} MiB; write groups under "
                    f"{limit}.",
                    field="file",
                )
        for batch in file.iter_batches(batch_size=64, use_threads=False):
            remaining_bytes -= batch.nbytes
            if remaining_bytes < 0:
                raise too_large_error()
            for index in range(batch.num_rows):
                number += 1
                row = batch.slice(index, 1)  # one at a time: a small file may contain huge rows
                yield (
                    number,
                    row_too_long_error() if row.nbytes > MAX_ROW_BYTES else row.to_pylist()[0],
                )
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise BadFile(
            f"The Parquet file is corrupt after row {number:,}: {str(error).splitlines()[0][:200]}",
            field="file",
        ) from error


READERS: dict[str, Callable[[Any, Format], Iterator[NumberedRecord]]] = {
    "jsonl": iter_jsonl,
    "json": lambda file, _file_format: iter_json_objects(file),
    "csv": iter_csv,
    "text": iter_text,
}
