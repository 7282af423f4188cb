"""Reads the records of a file of any format in bounded memory. No row formats and no ORM here."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from training.datasets.errors import BadFile, BadRow, clean_text
from training.datasets.formats import EXCEL_SEPARATOR, Format, open_file
from training.datasets.json_items import (
    build_row_too_large,
    iter_json_objects,
    parse_json,
    to_records,
)
from training.datasets.rows import MAX_ROW_BYTES, check_text
from training.datasets.values import normalize_record
from training.formatting import format_binary_bytes

MAX_COLUMNS = 1_000
MAX_ROW_GROUP_BYTES = 512 * 2**20
NumberedRecord = tuple[int, dict[str, Any] | BadRow]

# Below the length at which lines are truncated, so that an oversized field is reported as one
csv.field_size_limit(MAX_ROW_BYTES - 4096)


def iter_records(path: Path, file_format: Format, *, max_bytes: int) -> Iterator[NumberedRecord]:
    """Every record with its line or row number; a broken record is yielded as a BadRow.

    Raises:
        BadFile: the rest of the file cannot be read.
    """
    number = 0
    try:
        for number, record in iter_raw_records(path, file_format, max_bytes):
            if isinstance(record, BadRow):
                yield number, record
                continue
            if len(record) > MAX_COLUMNS:
                yield number, BadRow(f"has more than {MAX_COLUMNS:,} columns")
                continue
            try:
                yield number, normalize_record(record)
            except BadRow as bad:
                yield number, bad
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise BadFile(
            f"The gzip file is truncated or corrupt after line {number:,}.", field="file"
        ) from error
    except UnicodeDecodeError as error:
        raise BadFile(
            f"The file is not {file_format.encoding.upper()} after line {number:,} "
            f"({error.reason}); save it as UTF-8.",
            field="file",
        ) from error


def iter_raw_records(path: Path, file_format: Format, max_bytes: int) -> Iterator[NumberedRecord]:
    if file_format.kind == "parquet":
        yield from iter_parquet(path, max_bytes)
    elif file_format.kind == "arrow":
        yield from iter_arrow(path, max_bytes)
    else:
        with open_file(path, file_format.zipped) as raw:
            file: Any = LimitedFile(raw, max_bytes)
            if file_format.encoding != "utf-8" or file_format.has_cr_lines:
                file = io.BufferedReader(Utf8File(file, file_format))
            yield from READERS[file_format.kind](file, file_format)


class Utf8File(io.RawIOBase):
    """A file in another encoding or with carriage returns alone, as UTF-8 with newlines."""

    def __init__(self, file: Any, file_format: Format) -> None:
        self.file, self.has_cr_lines = file, file_format.has_cr_lines
        # Lone surrogates are kept, so that the row that holds one is reported.
        self.decoder = codecs.getincrementaldecoder(file_format.encoding)(
            "surrogateescape" if file_format.encoding == "utf-8" else "surrogatepass"
        )
        self.buffer = b""

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        is_at_end = False
        while not self.buffer and not is_at_end:
            chunk = self.file.read(2**16)
            is_at_end = not chunk
            text = self.decoder.decode(chunk, final=is_at_end)
            text = text.replace("\r", "\n") if self.has_cr_lines else text
            has_surrogates = any("\ud800" <= character <= "\udfff" for character in text)
            self.buffer = text.encode("utf-8", "surrogatepass" if has_surrogates else "strict")
        size = min(len(target), len(self.buffer))
        target[:size], self.buffer = self.buffer[:size], self.buffer[size:]
        return size


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


def iter_jsonl(file: Any, _file_format: Format) -> Iterator[NumberedRecord]:
    for number, raw_line in enumerate(iter_bounded_lines(file), start=1):
        line = raw_line
        while line.startswith(codecs.BOM_UTF8):  # joined files have one on any line
            line = line.removeprefix(codecs.BOM_UTF8)
        if not line.strip():
            continue
        try:
            for record in parse_line_records(line):
                yield number, record
        except BadRow as bad:
            yield number, bad


def parse_line_records(line: bytes) -> list[dict[str, Any] | BadRow]:
    if len(line) > MAX_ROW_BYTES:
        raise build_row_too_large()
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRow(
            f"byte {error.start + 1} is not UTF-8; save the file as UTF-8", group="not UTF-8"
        ) from error
    return to_records(parse_json(text.strip().removesuffix(",")))


class CsvLines:
    """Decodes lines for csv.reader and records whether one exceeded MAX_ROW_BYTES."""

    def __init__(self, file: Any) -> None:
        self.lines, self.is_first, self.is_truncated = iter_bounded_lines(file), True, False

    def __iter__(self) -> Iterator[str]:
        for line in self.lines:
            self.is_truncated = self.is_truncated or len(line) > MAX_ROW_BYTES
            text = line.decode(errors="surrogateescape").lstrip("\ufeff")
            # Excel's line is empty for csv.reader, which counts it.
            yield "\n" if self.is_first and EXCEL_SEPARATOR.fullmatch(text) else text
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
        if not any(cells):  # Excel writes empty rows after the last one
            continue
        if not header:
            header = read_header(cells, file_format)
            if file_format.header:
                continue
        if lines.is_truncated:
            yield number, build_row_too_large()
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
        text = line.decode("utf-8-sig", errors="surrogateescape")
        ends = file_format.unit == "line" or not text.strip()
        if text.strip():
            start_line = start_line if block else number
            size += len(line)
            if size <= MAX_ROW_BYTES:
                block.append(text)
        if ends and size:
            yield (
                start_line,
                build_row_too_large()
                if size > MAX_ROW_BYTES
                else {"text": "".join(block).rstrip()},
            )
            block, size = [], 0
    if size:
        yield (
            start_line,
            build_row_too_large() if size > MAX_ROW_BYTES else {"text": "".join(block).rstrip()},
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
        check_column_names(file.schema_arrow.names)
        batches = file.iter_batches(batch_size=64, use_threads=False)
        for record in iter_batches(batches, remaining_bytes):
            number += 1
            yield number, record
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise BadFile(
            f"The Parquet file is corrupt after row {number:,}: {str(error).splitlines()[0][:200]}",
            field="file",
        ) from error


def iter_arrow(path: Path, remaining_bytes: int) -> Iterator[NumberedRecord]:
    """The rows of an Arrow file, or of Arrow streams one after another; `datasets.save_to_disk`
    writes streams.
    """
    import pyarrow
    import pyarrow.ipc

    number = 0
    try:
        with pyarrow.OSFile(str(path)) as source:
            is_file = source.read(6) == b"ARROW1"
            source.seek(0)
            while source.tell() < source.size():
                reader: Any = (pyarrow.ipc.open_file if is_file else pyarrow.ipc.open_stream)(
                    source
                )
                check_column_names(reader.schema.names)
                batches = (
                    (reader.get_batch(index) for index in range(reader.num_record_batches))
                    if is_file
                    else reader
                )
                for record in iter_batches(batches, remaining_bytes):
                    number += 1
                    yield number, record
                if is_file:
                    return
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise BadFile(
            f"The Arrow file is corrupt after row {number:,}: {str(error).splitlines()[0][:200]}",
            field="file",
        ) from error


def check_column_names(names: list[str]) -> None:
    """Raises BadFile: a name is used twice, so that a value would be lost."""
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated is not None:
        raise BadFile(
            f"The file has the column `{clean_text(repeated)[:40]}` twice. Rename one of them.",
            field="file",
        )


def iter_batches(batches: Any, remaining_bytes: int) -> Iterator[dict[str, Any] | BadRow]:
    """Raises pyarrow.ArrowInvalid: a batch whose offsets point outside of its buffers."""
    for batch in batches:
        batch.validate(full=True)
        readable = cast_batch(batch)
        for index in range(batch.num_rows):
            row = readable.slice(index, 1)  # one at a time: a small file may contain huge rows
            remaining_bytes -= row.nbytes
            if remaining_bytes < 0:
                raise too_large_error()
            if row.nbytes > MAX_ROW_BYTES:
                yield build_row_too_large()
                continue
            try:
                yield row.to_pylist()[0]
            except (OverflowError, ValueError) as error:
                yield BadRow(
                    f"holds a value that cannot be read ({error})", group="unreadable value"
                )


def cast_batch(batch: Any) -> Any:
    """The batch with dates and times as text, since Python has no nanoseconds and ends at the year
    9999, and with floats of 16 and 32 bits as doubles of the same digits: 0.1, not
    0.10000000149011612.
    """
    import pyarrow

    columns = [cast_column(column) for column in batch.columns]
    return pyarrow.RecordBatch.from_arrays(columns, names=batch.schema.names)


def cast_column(column: Any) -> Any:
    import pyarrow

    types, kind = pyarrow.types, column.type
    if types.is_temporal(kind):
        column = column.cast(pyarrow.int64()) if types.is_duration(kind) else column
        return column.cast(pyarrow.string())
    if types.is_float32(kind):
        return column.cast(pyarrow.string()).cast(pyarrow.float64())
    if types.is_float16(kind):  # Arrow cannot write it as text
        numbers = [
            None if number is None else float(str(np.float16(number)))
            for number in column.to_pylist()
        ]
        return pyarrow.array(numbers, pyarrow.float64())
    return cast_nested(column) if has_cast_type(kind) else column


def cast_nested(column: Any) -> Any:
    """A list, map or struct of a whole batch, cast by its parts. A null map becomes empty."""
    import pyarrow

    types, kind = pyarrow.types, column.type
    if types.is_fixed_size_list(kind):
        return cast_column(column.cast(pyarrow.list_(kind.value_type)))
    if types.is_map(kind):
        items = cast_column(column.items)
        return pyarrow.MapArray.from_arrays(column.offsets, column.keys, items)
    if types.is_struct(kind):
        parts = [cast_column(part) for part in column.flatten()]
        names = [kind.field(index).name for index in range(kind.num_fields)]
        return pyarrow.StructArray.from_arrays(parts, names, mask=column.is_null())
    build = pyarrow.ListArray if types.is_list(kind) else pyarrow.LargeListArray
    return build.from_arrays(column.offsets, cast_column(column.values), mask=column.is_null())


def has_cast_type(kind: Any) -> bool:
    """Whether a nested type holds a type that `cast_column` changes."""
    import pyarrow

    types = pyarrow.types
    if types.is_struct(kind):
        return any(has_cast_type(kind.field(index).type) for index in range(kind.num_fields))
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return has_cast_type(kind.value_type)
    if types.is_map(kind):
        return has_cast_type(kind.item_type)
    return bool(types.is_temporal(kind) or types.is_float16(kind) or types.is_float32(kind))


READERS: dict[str, Callable[[Any, Format], Iterator[NumberedRecord]]] = {
    "jsonl": iter_jsonl,
    "json": lambda file, _file_format: iter_json_objects(file),
    "csv": iter_csv,
    "text": iter_text,
}
