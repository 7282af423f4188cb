"""JSON read strictly, and a JSON array read item by item, so that a file of gigabytes needs the
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

PIECE = 2**16
BLANK = re.compile(r"[ \t\r\n]*")
# An error this close to the end of what was read may be cured by reading on: a cut literal, number
# or escape.
EDGE = 16


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise BadRow(
                f"the key `{name[:40]}` stands there twice", group="a key stands there twice"
            )
        found[name] = value
    return found


DECODER = json.JSONDecoder(object_pairs_hook=unique_keys)


def loads(text: str) -> Any:
    """One JSON value.

    Raises:
        BadRow: no JSON, a key twice, nesting too deep, a number too long.
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
        raise BadRow(f"not JSON that can be read: {error}") from error


class Reader:
    """Text that grows piece by piece at its end and is dropped at its beginning; counts the lines
    that went by.
    """

    def __init__(self, file: Any) -> None:
        self.file = file
        self.decode = codecs.getincrementaldecoder("utf-8-sig")(errors="surrogateescape").decode
        self.text, self.at, self.line, self.ended = "", 0, 1, False

    def more(self) -> bool:
        """Read on, twice as much as there is; False at the end of the file."""
        if self.ended:
            return False
        piece = self.file.read(max(PIECE, len(self.text) - self.at))
        self.ended = not piece
        self.text, self.at = self.text[self.at :] + self.decode(piece, final=self.ended), 0
        return True

    def pass_to(self, place: int) -> None:
        self.line += self.text.count("\n", self.at, place)
        self.at = place

    def peek(self) -> str:
        """The next character that is not blank; empty at the end."""
        while True:
            match = BLANK.match(self.text, self.at)
            self.pass_to(match.end() if match else self.at)
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.more():
                return ""


PLAIN = json.JSONDecoder()


def json_items(file: Any) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
    """The objects of a JSON array with the line on which each begins. After a fault in the syntax
    nothing more can be told.
    """
    yield from items(Reader(file))


def items(reader: Reader) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
    first = reader.peek()
    if first != "[":
        yield (
            reader.line,
            BadRow(
                f"expected a JSON array of rows; found {first or 'nothing'!r}",
                group="not a JSON array",
                ends=True,
            ),
        )
        return
    reader.pass_to(reader.at + 1)
    while (mark := reader.peek()) and mark != "]":
        value, end = read_item(reader)
        yield (
            reader.line,
            value if isinstance(value, dict | BadRow) else BadRow("expected a JSON object"),
        )
        if not end:
            return
        reader.pass_to(end)
        mark = reader.peek()
        if mark == ",":
            reader.pass_to(reader.at + 1)
            mark = "" if reader.peek() == "]" else ","
        if mark not in (",", "]") and reader.text[reader.at :]:
            yield (
                reader.line,
                BadRow("not JSON: one comma belongs between two rows", group="not JSON", ends=True),
            )
            return
    if not mark:
        yield (
            reader.line,
            BadRow(
                "the file is cut off: the closing `]` is missing",
                group="the file is cut off",
                ends=True,
            ),
        )
        return
    reader.pass_to(reader.at + 1)
    if reader.peek():
        yield (
            reader.line,
            BadRow(
                "there is more after the closing `]`; it was not read", group="more after the array"
            ),
        )


def read_item(reader: Reader) -> tuple[Any, int]:
    """The value at the reader's place and where it ends; a BadRow and 0 if nothing after it can be
    read.
    """
    while True:
        length = len(reader.text) - reader.at
        try:
            try:
                return DECODER.raw_decode(reader.text, reader.at)
            except BadRow as bad:  # a key twice: the row is faulty, the file goes on
                return bad, PLAIN.raw_decode(reader.text, reader.at)[1]
        except RecursionError:
            return BadRow("the JSON is nested too deeply", ends=True), 0
        except json.JSONDecodeError as error:
            wrong = error.pos < len(reader.text) - EDGE and not error.msg.startswith(
                "Unterminated string"
            )
            if length > MAX_ROW_BYTES:
                words = (
                    f"the row has more than {format_binary_bytes(MAX_ROW_BYTES)}, or a quote or "
                    "bracket is never closed"
                )
                return BadRow(words, ends=True), 0
            if wrong or not reader.more():
                return BadRow(
                    f"not JSON: {error.msg}; the rest of the file cannot be read",
                    group="not JSON",
                    ends=True,
                ), 0
        except ValueError as error:  # a number of more than 4,300 digits
            return BadRow(f"not JSON that can be read: {error}", ends=True), 0
