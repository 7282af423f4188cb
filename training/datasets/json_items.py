"""Strict JSON parsing, and a streaming reader for JSON files of any shape: a file of gigabytes
needs the memory of one row.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Generator, Iterator, Mapping
from typing import Any

from training.datasets.column_mapping import PART_ALIASES
from training.datasets.errors import BadRow
from training.datasets.rows import MAX_ROW_BYTES, belongs_to_conversation, find_split, is_message
from training.datasets.values import SourceFloat, check_unique_keys
from training.formatting import format_binary_bytes

CHUNK_SIZE = 2**16
WHITESPACE = re.compile("[ \t\r\n\ufeff]*")  # a BOM is between files that were joined
# An error this close to the end of the window may be a literal, number or escape that is not
# complete yet: read more and try again.
EDGE = 16
# Keys around the rows of a file, besides the names of the splits
WRAPPER_KEYS = frozenset(
    ("data", "rows", "records", "examples", "items", "samples", "instances", "dataset", "results")
)
KEY_COLUMN = "key"  # of the rows under several keys
NumberedValue = tuple[int, dict[str, Any] | BadRow]
Rows = Generator[NumberedValue, None, bool]  # returns whether reading can go on


DECODER = json.JSONDecoder(object_pairs_hook=check_unique_keys, parse_float=SourceFloat)
LENIENT_DECODER = json.JSONDecoder()


def parse_json(text: str) -> Any:
    """Parse one JSON value.

    Raises:
        BadRow: not JSON, a duplicate key, nesting too deep, or a number too long.
    """
    try:
        return DECODER.decode(text)
    except RecursionError as error:
        raise BadRow("the JSON is nested too deeply") from error
    except json.JSONDecodeError as error:
        raise BadRow(
            f"not JSON: {error.msg} at character {error.pos + 1}", group="not JSON"
        ) from error
    except ValueError as error:  # a number of more than 4,300 digits
        raise BadRow(f"unsupported JSON: {error}") from error


def to_records(value: Any) -> list[dict[str, Any] | BadRow]:
    """The records of one line: several if it is an array of objects that are no messages."""
    is_rows = (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(item, dict) and not is_message(item) for item in value)
    )
    return value if is_rows else [to_record(value)]


def to_record(value: Any) -> dict[str, Any] | BadRow:
    """A JSON value as a record: an object as it is, a list of messages as a conversation, a list of
    texts and numbers as columns, and a text as plain text.
    """
    if isinstance(value, dict | BadRow):
        return value
    if isinstance(value, str):
        return {"text": value}
    if isinstance(value, list) and value:
        if all(isinstance(item, dict) for item in value):
            return {"conversations" if "from" in value[0] else "messages": value}
        if not any(isinstance(item, list | dict) for item in value):
            return {f"column {number}": item for number, item in enumerate(value, start=1)}
    return BadRow("expected a JSON object")


class JsonReader:
    """A window of text over a file: it grows at its end, drops what was parsed at its beginning,
    and counts the lines passed.
    """

    def __init__(self, file: Any) -> None:
        self.file = file
        self.decode = codecs.getincrementaldecoder("utf-8-sig")(errors="surrogateescape").decode
        self.text, self.position, self.line, self.is_at_end = "", 0, 1, False

    def read_more(self) -> bool:
        """Read at least as much as is unparsed. Returns False at the end of the file."""
        if self.is_at_end:
            return False
        chunk = self.file.read(max(CHUNK_SIZE, len(self.text) - self.position))
        self.is_at_end = not chunk
        self.text, self.position = (
            self.text[self.position :] + self.decode(chunk, final=self.is_at_end),
            0,
        )
        return True

    def advance_to(self, position: int) -> None:
        self.line += self.text.count("\n", self.position, position)
        self.position = position

    def peek_character(self) -> str:
        """The next character that is not whitespace; empty at the end of the file."""
        while True:
            match = WHITESPACE.match(self.text, self.position)
            self.advance_to(match.end() if match else self.position)
            if self.position < len(self.text):
                return self.text[self.position]
            if not self.read_more():
                return ""

    def skip_character(self, character: str) -> bool:
        """Skip whitespace and the character. Returns False if another one follows."""
        if self.peek_character() != character:
            return False
        self.advance_to(self.position + 1)
        return True

    def is_last_value(self, end: int) -> bool:
        """Whether only whitespace follows the value that ends at `end`. Nothing is skipped."""
        length = end - self.position
        while True:
            match = WHITESPACE.match(self.text, self.position + length)
            if match and match.end() < len(self.text):
                return False
            if not self.read_more():
                return True


def iter_json_objects(file: Any) -> Iterator[NumberedValue]:
    """The rows of a JSON file, each with the line on which it begins: an array, objects one after
    another, or an object around arrays of rows. Nothing after a syntax error can be read.
    """
    reader = JsonReader(file)
    is_first = True
    while first := reader.peek_character():
        if first == "[":
            can_go_on = yield from iter_array(reader)
        elif first == "{":
            can_go_on = yield from iter_object(reader, is_first)
        elif first == "," and not is_first:
            can_go_on = reader.skip_character(",")
        else:
            yield (
                reader.line,
                BadRow(
                    f"expected a JSON array or object; found {first!r}",
                    group="neither a JSON array nor an object",
                    is_fatal=True,
                ),
            )
            return
        if not can_go_on:
            return
        is_first = False


def iter_array(reader: JsonReader, split: str = "") -> Rows:
    """The rows of an array. An array of messages is one row."""
    conversation: list[Any] = []
    lines: list[int] = []
    start_line, is_first, size = reader.line, True, 0
    reader.skip_character("[")
    while (next_character := reader.peek_character()) and next_character != "]":
        line, (value, end) = reader.line, read_item(reader)
        size += end - reader.position
        if (conversation or is_first) and is_message(value):
            if belongs_to_conversation(value, conversation[0] if conversation else value):
                if size <= MAX_ROW_BYTES or not conversation:
                    conversation.append(value)
                    lines.append(line)
            else:  # each item is a row
                for number, record in zip([*lines, line], [*conversation, value], strict=True):
                    yield number, add_split(record, split)
                conversation, lines = [], []
        else:
            yield line, add_split(to_record(value), split)
        is_first = False
        if not end:
            return False
        reader.advance_to(end)
        next_character = reader.peek_character()
        reader.skip_character(",")  # also after the last row
        if next_character not in (",", "]") and reader.text[reader.position :]:
            yield (
                reader.line,
                BadRow(
                    "not JSON: expected one comma between two rows", group="not JSON", is_fatal=True
                ),
            )
            return False
    if conversation:
        row = build_row_too_large() if size > MAX_ROW_BYTES else to_record(conversation)
        yield start_line, add_split(row, split)
    if not next_character:
        yield reader.line, build_incomplete_file("]")
        return False
    return reader.skip_character("]")


def build_incomplete_file(bracket: str) -> BadRow:
    return BadRow(
        f"the file is incomplete: the closing `{bracket}` is missing",
        group="the file is incomplete",
        is_fatal=True,
    )


def build_row_too_large() -> BadRow:
    return BadRow(
        f"the row is larger than {format_binary_bytes(MAX_ROW_BYTES)}; split it",
        code="row_too_large",
    )


def add_split(record: dict[str, Any] | BadRow, split: str) -> dict[str, Any] | BadRow:
    return {"split": split, **record} if split and isinstance(record, dict) else record


def iter_object(reader: JsonReader, is_first: bool) -> Rows:
    """An object as one row. The only one of a file may hold the rows, in arrays or in columns."""
    line, (value, end) = reader.line, read_item(reader)
    if is_first and isinstance(value, BadRow) and value.code == "row_too_large":
        return (yield from iter_wrapper(reader))
    if is_first and end and isinstance(value, dict):
        length = end - reader.position
        is_only_value = reader.is_last_value(end)
        end = reader.position + length
        if is_only_value and value and all(inner == [] for inner in value.values()):
            return False  # no rows
        if is_only_value and (row_keys := find_row_keys(value)):
            shared = {key: inner for key, inner in value.items() if key not in row_keys}
            return (yield from iter_wrapper(reader, row_keys, shared))
        if is_only_value and (rows := transpose_columns(value)):
            for row in rows:
                yield line, row
            return False
    yield line, to_record(value)
    if end:
        reader.advance_to(end)
    return bool(end)


def find_row_keys(value: Mapping[str, Any]) -> list[str]:
    """The keys of an object that hold lists of rows. One of WRAPPER_KEYS is enough; with the name
    of a split, all lists are splits; other names only if the object holds nothing else. An object
    that holds messages, or a prompt and its answer, is a row itself.
    """
    if any(isinstance(inner, list) and inner and is_message(inner[0]) for inner in value.values()):
        return []
    keys = [key for key, inner in value.items() if is_list_of_rows(inner)]
    texts = {key.lower() for key, inner in value.items() if isinstance(inner, str)}
    if texts & {*PART_ALIASES["prompt"]} and texts & {*PART_ALIASES["completion"]}:
        return []
    for key in keys:
        if key.lower() in WRAPPER_KEYS and "columns" not in value:
            return [key]
    if any(find_split(key) for key in keys):
        return keys
    return keys if len(keys) == len(value) else []


def is_list_of_rows(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(item, dict | list) and not is_message(item) for item in value[:20])
    )


def transpose_columns(value: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of an object that pandas' `to_json` wrote: columns as lists, columns or rows keyed
    by the index, or `{"columns": [...], "data": [[...]]}`. An index of texts is a column.
    """
    names, cells = value.get("columns"), value.get("data")
    inner = list(value.values())
    rows: list[dict[str, Any]] = []
    if isinstance(names, list) and is_list_of_rows(cells):
        if all(len(row) == len(names) for row in cells or ()):
            rows = [dict(zip(map(str, names), row, strict=True)) for row in cells or ()]
    elif inner and all(isinstance(column, list) for column in inner):
        has_messages = any(is_message(cell) for column in inner for cell in column)
        if len({len(column) for column in inner}) == 1 and len(inner[0]) > 1 and not has_messages:
            rows = [dict(zip(value, row, strict=True)) for row in zip(*inner, strict=True)]
    elif len(inner) > 1 and all(isinstance(column, dict) and column for column in inner):
        has_equal_keys = all(column.keys() == inner[0].keys() for column in inner)
        if has_equal_keys and all(key.isdecimal() for key in inner[0]):
            rows = [{name: value[name][key] for name in value} for key in inner[0]]
        elif set.intersection(*map(set, inner)):
            is_index = all(key.isdecimal() for key in value)
            rows = [
                column if is_index else {KEY_COLUMN: key, **column} for key, column in value.items()
            ]
    return rows


def iter_wrapper(
    reader: JsonReader,
    row_keys: list[str] | None = None,
    shared: Mapping[str, Any] | None = None,
) -> Rows:
    """The rows of the arrays in an object. An array beside one whose key names a split is a split;
    other keys become a column if there are several. The object's other values, `shared`, are
    columns of every row. `row_keys` None: the object is too large to be parsed at once, all arrays
    hold rows, and other values can be columns only if they come first.
    """
    start_line, has_rows, columns = reader.line, False, dict(shared or {})
    has_splits = any(find_split(key) for key in row_keys or ())
    needs_key = len(row_keys or ()) > 1
    reader.skip_character("{")
    while (next_character := reader.peek_character()) != "}":
        key, end = read_item(reader)
        if not end or not isinstance(key, str):
            problem = key if isinstance(key, BadRow) else build_incomplete_file("}")
            yield reader.line, problem
            return False
        reader.advance_to(end)
        reader.skip_character(":")
        if reader.peek_character() == "[" and (row_keys is None or key in row_keys):
            has_rows = True
            has_splits = has_splits or bool(find_split(key))
            needs_key = needs_key or (row_keys is None and key.lower() not in WRAPPER_KEYS)
            rows = iter_array(reader, (find_split(key) or key) if has_splits else "")
            key_column = {KEY_COLUMN: key} if needs_key and not has_splits else {}
            if not (yield from add_shared(rows, columns | key_column)):
                return False
        else:
            value, end = read_item(reader)
            if not end:
                yield reader.line, value
                return False
            if row_keys is None and has_rows:
                yield (
                    reader.line,
                    BadRow(
                        f"`{key[:40]}` comes after the rows; move it before them, or into each row",
                        group="a value comes after the rows",
                    ),
                )
            elif row_keys is None and not isinstance(value, BadRow):
                columns[key] = value
            reader.advance_to(end)
        reader.skip_character(",")
    if not has_rows:
        yield start_line, build_row_too_large()
    return reader.skip_character(next_character)


def add_shared(rows: Rows, shared: Mapping[str, Any]) -> Rows:
    while True:
        try:
            line, record = next(rows)
        except StopIteration as end:
            return bool(end.value)
        yield line, {**shared, **record} if isinstance(record, dict) else record


def read_item(reader: JsonReader) -> tuple[Any, int]:
    """The value at the reader's position and where it ends; a BadRow and 0 if the rest of the file
    cannot be read.
    """
    while True:
        length = len(reader.text) - reader.position
        try:
            try:
                value, end = DECODER.raw_decode(reader.text, reader.position)
                is_too_large = end - reader.position > MAX_ROW_BYTES
                return build_row_too_large() if is_too_large else value, end
            except BadRow as bad:  # duplicate key: skip this row, read the next ones
                return bad, LENIENT_DECODER.raw_decode(reader.text, reader.position)[1]
        except RecursionError:
            return BadRow("the JSON is nested too deeply", is_fatal=True), 0
        except json.JSONDecodeError as error:
            is_syntax_error = error.pos < len(reader.text) - EDGE and not error.msg.startswith(
                "Unterminated string"
            )
            if length > MAX_ROW_BYTES:
                message = (
                    f"the row is larger than {format_binary_bytes(MAX_ROW_BYTES)}, or a quote or "
                    "bracket is never closed"
                )
                return BadRow(message, is_fatal=True, code="row_too_large"), 0
            if is_syntax_error or not reader.read_more():
                return BadRow(
                    f"not JSON: {error.msg}; the rest of the file cannot be read",
                    group="not JSON",
                    is_fatal=True,
                ), 0
        except ValueError as error:  # a number of more than 4,300 digits
            return BadRow(f"unsupported JSON: {error}", is_fatal=True), 0
