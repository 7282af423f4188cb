"""Strict JSON parsing, and a streaming reader for a JSON array: a file of gigabytes needs the
memory of one row.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any

from training.datasets.rows import MAX_ROW_BYTES, BadRow
from training.formatting import format_binary_bytes

CHUNK_SIZE = 2**16
WHITESPACE = re.compile(r"[ \t\r\n]*")
# An error this close to the end of the window may be a literal, number or escape that is not
# complete yet: read more and try again.
EDGE = 16


def check_unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise BadRow(f"duplicate key `{name[:40]}`", group="duplicate key")
        result[name] = value
    return result


DECODER = json.JSONDecoder(object_pairs_hook=check_unique_keys)


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


LENIENT_DECODER = json.JSONDecoder()


def iter_json_objects(file: Any) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
    """The objects of a JSON array, each with the line on which it begins. Nothing after a syntax
    error can be read.
    """
    yield from iter_array(JsonReader(file))


def iter_array(reader: JsonReader) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
    first = reader.peek_character()
    if first != "[":
        yield (
            reader.line,
            BadRow(
                f"expected a JSON array of rows; found {first or 'nothing'!r}",
                group="not a JSON array",
                is_fatal=True,
            ),
        )
        return
    reader.advance_to(reader.position + 1)
    while (next_character := reader.peek_character()) and next_character != "]":
        value, end = read_item(reader)
        yield (
            reader.line,
            value if isinstance(value, dict | BadRow) else BadRow("expected a JSON object"),
        )
        if not end:
            return
        reader.advance_to(end)
        next_character = reader.peek_character()
        if next_character == ",":
            reader.advance_to(reader.position + 1)
            next_character = "" if reader.peek_character() == "]" else ","
        if next_character not in (",", "]") and reader.text[reader.position :]:
            yield (
                reader.line,
                BadRow(
                    "not JSON: expected one comma between two rows", group="not JSON", is_fatal=True
                ),
            )
            return
    if not next_character:
        yield (
            reader.line,
            BadRow(
                "the file is incomplete: the closing `]` is missing",
                group="the file is incomplete",
                is_fatal=True,
            ),
        )
        return
    reader.advance_to(reader.position + 1)
    if reader.peek_character():
        yield (
            reader.line,
            BadRow("content after the closing `]` was not read", group="content after the array"),
        )


def read_item(reader: JsonReader) -> tuple[Any, int]:
    """The value at the reader's position and where it ends; a BadRow and 0 if the rest of the file
    cannot be read.
    """
    while True:
        length = len(reader.text) - reader.position
        try:
            try:
                return DECODER.raw_decode(reader.text, reader.position)
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
                return BadRow(message, is_fatal=True), 0
            if is_syntax_error or not reader.read_more():
                return BadRow(
                    f"not JSON: {error.msg}; the rest of the file cannot be read",
                    group="not JSON",
                    is_fatal=True,
                ), 0
        except ValueError as error:  # a number of more than 4,300 digits
            return BadRow(f"unsupported JSON: {error}", is_fatal=True), 0
