"""Cleans the values of a record before any row format reads them: missing values, Arrow's maps,
bytes, and Python literals in text. No row formats and no ORM here.
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Mapping
from typing import Any

from training.datasets.errors import BadRow

MAX_DEPTH = 64  # the deepest schemas of tools have about 20 levels
MAX_LITERAL_CHARACTERS = 1_000_000
PLAIN_TYPES = (str, bool, int)
LITERAL_TOKEN = re.compile(
    r"""(?P<string>'(?:[^'\\]|\\.)*' | "(?:[^"\\]|\\.)*")
      | (?P<number>-?(?:\d+\.?\d*(?:[eE][+-]?\d+)?|inf))
      | (?P<word>None|True|False|nan)
      | (?P<open>[\[{(]|array\()
      | (?P<close>[\]})]|,\ *dtype=\w+\))
      | (?P<sign>[:,])""",
    re.VERBOSE | re.DOTALL,
)
WHITESPACE = re.compile(r"\s*")
# What a bracket opens and closes: a tuple is a list, and NumPy's `array(...)` is what is in it
BRACKETS = {"[": ("[", "]"), "{": ("{", "}"), "(": ("[", "]"), "array(": ("(", ")")}


class SourceFloat(float):
    """A number of a JSON file with the text that the file has: a label 1.10 stays 1.10."""

    text: str

    def __new__(cls, text: str) -> SourceFloat:
        number = super().__new__(cls, text)
        number.text = text
        return number


def normalize_record(record: Mapping[Any, Any]) -> dict[str, Any]:
    """The record with plain JSON values. NaN and infinity are missing (None), as pandas and
    `json.dumps` write empty cells as NaN.

    Raises:
        BadRow: nested more than MAX_DEPTH levels deep.
    """
    cleaned: dict[str, Any] = normalize_value(record)
    return cleaned


def normalize_value(value: Any, depth: int = 0) -> Any:
    if value is None or isinstance(value, PLAIN_TYPES):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if depth > MAX_DEPTH:
        raise BadRow(f"the row is nested more than {MAX_DEPTH} levels deep")
    if isinstance(value, Mapping):
        return {str(key): normalize_value(inner, depth + 1) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        if value and all(isinstance(item, tuple) and len(item) == 2 for item in value):
            return {
                str(key): normalize_value(inner, depth + 1) for key, inner in value
            }  # Arrow's map
        return [normalize_value(inner, depth + 1) for inner in value]
    # Dates, times and decimals of Parquet become text.
    return value.decode(errors="surrogateescape") if isinstance(value, bytes) else str(value)


def check_unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise BadRow(f"duplicate key `{name[:40]}`", group="duplicate key")
        result[name] = value
    return result


def parse_nested(value: Any) -> Any:
    """A list or object that a text cell holds as JSON or as a Python literal (pandas' `to_csv`
    writes lists with Python's repr); any other value unchanged.

    Raises:
        BadRow: the JSON has a key twice, or is nested too deeply.
    """
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    try:
        return normalize_value(json.loads(value, object_pairs_hook=check_unique_keys))
    except (ValueError, RecursionError):
        return normalize_value(parse_literal(value))


def parse_literal(text: str) -> Any:
    """The Python literal in `text`, or the text unchanged if it is none.

    NumPy's repr is accepted: `array([...], dtype=object)`, and no comma between two values. Only
    literals reach `ast`, so that no expression can be deep or long.
    """
    if len(text) > MAX_LITERAL_CHARACTERS:
        return text
    tokens: list[str] = []
    closing: list[str] = []
    position, was_value = 0, False
    end = len(text.rstrip())
    while (position := skip_whitespace(text, position)) < end:
        match = LITERAL_TOKEN.match(text, position)
        if match is None:
            return text
        kind, position = match.lastgroup, match.end()
        part = "None" if match[0] in ("nan", "inf", "-inf") else match[0]
        if kind == "open":
            part, bracket = BRACKETS[part]
            closing.append(bracket)
        elif kind == "close":
            part = closing.pop() if closing else part
        if len(closing) > MAX_DEPTH:
            return text
        if was_value and kind not in ("close", "sign"):
            tokens.append(",")
        tokens.append(part)
        was_value = kind not in ("open", "sign")
    try:
        return ast.literal_eval(" ".join(tokens))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


def skip_whitespace(text: str, position: int) -> int:
    match = WHITESPACE.match(text, position)
    return match.end() if match else position


def remove_nulls(value: Any, schema: Any = None) -> Any:
    """The value without keys whose value is null. Arrow gives all objects of a column the same
    keys, so a call holds the arguments of all other tools as null. A null that the JSON schema
    allows is kept.
    """
    if isinstance(value, Mapping):
        properties = schema.get("properties") if isinstance(schema, Mapping) else None
        properties = properties if isinstance(properties, Mapping) else {}
        return {
            key: remove_nulls(inner, properties.get(key))
            for key, inner in value.items()
            if inner is not None or allows_null(properties.get(key))
        }
    if isinstance(value, list):
        items = schema.get("items") if isinstance(schema, Mapping) else None
        return [remove_nulls(inner, items) for inner in value]
    return value


def remove_schema_nulls(schema: Any) -> Any:
    """A JSON schema without the nulls that Arrow added. `"default": null` is kept where the schema
    allows null.
    """
    if isinstance(schema, Mapping):
        return {
            key: remove_schema_nulls(inner)
            for key, inner in schema.items()
            if inner is not None or (key in ("default", "const") and allows_null(schema))
        }
    if isinstance(schema, list):
        return [remove_schema_nulls(inner) for inner in schema]
    return schema


def allows_null(schema: Any) -> bool:
    """Whether a JSON schema allows null, or refers to another schema that may."""
    if not isinstance(schema, Mapping):
        return False
    types, values = schema.get("type"), schema.get("enum")
    choices = [
        choice
        for key in ("anyOf", "oneOf", "allOf")
        if isinstance(listed := schema.get(key), list)
        for choice in listed
    ]
    return (
        types == "null"
        or (isinstance(types, list) and "null" in types)
        or (isinstance(values, list) and None in values)
        or schema.get("nullable") is True
        or isinstance(schema.get("$ref"), str)
        or any(allows_null(choice) for choice in choices)
    )
