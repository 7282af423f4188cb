"""Checks the text and numbers from outside: API and page requests, `/v1/`, YAML, uploaded JSON.

Python parses more than databases, browsers and other JSON parsers accept. What passes here can be
stored, sent and displayed everywhere. Does not import Django.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from training.errors import UserError

MAX_DEPTH = 100  # Python's own limit depends on the caller, and copying or rendering needs more
MAX_VALUES = 200_000  # checking them takes 0.1 s
MAX_INTEGER = 2**63  # a database column's limit
MAX_DIGITS = 20  # parsing time grows with the square of the digits
NESTED_MESSAGE = f"{{}} is nested deeper than {MAX_DEPTH} levels."
END = object()
UNSTORABLE = re.compile("[\0\ud800-\udfff]")


class InvalidInput(UserError):
    """A text or number that cannot be stored or sent."""


def check_text(text: str, name: str, *, field: str | None = None) -> None:
    """Raises InvalidInput: the text has a NUL character or half of a surrogate pair, which
    databases and UTF-8 do not have.
    """
    match = UNSTORABLE.search(text)
    if match is None:
        return
    kind = "a NUL character" if match[0] == "\0" else "half of a surrogate pair, not Unicode text,"
    message = f"{name} has {kind} at position {match.start() + 1}. Remove it."
    raise InvalidInput(message, field=name if field is None else field, code="unstorable_text")


def check_number(number: float, name: str, *, field: str | None = None) -> None:
    """Raises InvalidInput: the number is NaN, infinite, or an integer with too many digits."""
    if isinstance(number, int):
        if not -MAX_INTEGER <= number < MAX_INTEGER:
            raise InvalidInput(
                f"{name} has too many digits. Integers range from -2^63 to 2^63 - 1.",
                field=name if field is None else field,
                code="number_out_of_range",
            )
    elif not math.isfinite(number):
        raise InvalidInput(
            f"{name} is not a finite number, or too large for one. Numbers range up to 1.8e308.",
            field=name if field is None else field,
            code="number_out_of_range",
        )


def check_value(value: Any, whole: str, *, allow_any_number: bool = False) -> None:
    """Check every text, number and key of a parsed JSON or YAML value.

    `whole` is what messages call the value, such as `The request`; the field of an error is the
    path of the value inside it, such as `settings.rank`.

    Raises:
        InvalidInput: see `check_text` and `check_number`; or it has more than MAX_VALUES values or
            is nested deeper than MAX_DEPTH.
    """
    count = 0
    # One level for each container around the current value: its remaining items. `keys` lead to the
    # current value; its path is only built for a message, because a body of 1 MB may have a million
    # values below a path of 4 kB.
    levels: list[Iterator[tuple[Any, Any]]] = [iter([("", value)])]
    keys: list[Any] = [""]
    while levels:
        keys[-1], current = next(levels[-1], (None, END))
        if current is END:
            levels.pop()
            keys.pop()
            continue
        count += 1
        if count > MAX_VALUES:
            raise InvalidInput(f"{whole} has more than {MAX_VALUES:,} values.", code="too_large")
        if isinstance(current, str):
            if UNSTORABLE.search(current):
                path = format_path(keys)
                check_text(current, path or whole, field=path)
        elif isinstance(current, int | float):
            if not allow_any_number:
                check_path_number(current, whole, keys)
        elif isinstance(current, dict | list):
            if len(levels) > MAX_DEPTH:
                # The field is the outermost one: the path is as long as the value is deep
                raise InvalidInput(
                    NESTED_MESSAGE.format(whole), field=str(keys[1])[:40], code="nested_too_deeply"
                )
            if isinstance(current, dict):
                check_keys(current, whole, keys)
            levels.append(
                iter(current.items() if isinstance(current, dict) else enumerate(current))
            )
            keys.append("")


def check_path_number(number: float, whole: str, keys: Sequence[Any]) -> None:
    if not -MAX_INTEGER <= number < MAX_INTEGER or not math.isfinite(number):
        path = format_path(keys)
        check_number(number, path or whole, field=path)


def check_keys(mapping: Mapping[Any, Any], whole: str, keys: Sequence[Any]) -> None:
    for key in mapping:
        if UNSTORABLE.search(str(key)):
            path = format_path(keys)
            check_text(str(key), f"A key of {path or whole}", field=path)


def format_path(keys: Sequence[Any]) -> str:
    """The path of a value, such as `settings.rank`; empty for the whole value."""
    return ".".join(str(key)[:40] for key in keys[1:])


def parse_json(data: str | bytes, whole: str, *, allow_any_number: bool = False) -> Any:
    """Parse JSON from outside. `allow_any_number` is for files of models, which may have Infinity
    and integers of any size.

    Raises:
        InvalidInput: it is not JSON; or see `check_value`.
    """
    hooks: dict[str, Any] = {"parse_int": parse_int, "parse_constant": lambda _name: math.nan}
    try:
        value = json.loads(data, **({} if allow_any_number else hooks))
    except RecursionError as error:
        raise InvalidInput(NESTED_MESSAGE.format(whole), code="nested_too_deeply") from error
    except ValueError as error:
        raise InvalidInput(
            f"{whole} is not valid JSON: {str(error)[:200]}.", code="invalid_json"
        ) from error
    check_value(value, whole, allow_any_number=allow_any_number)
    return value


def clean_value(value: Any) -> Any:
    """The value with U+FFFD for what `check_text` refuses: for the output of programs and models,
    which must be stored whatever it is.
    """
    if isinstance(value, str):
        return UNSTORABLE.sub("\ufffd", value)
    if isinstance(value, dict):
        return {clean_value(key): clean_value(inner) for key, inner in value.items()}
    return [clean_value(inner) for inner in value] if isinstance(value, list) else value


def parse_int(digits: str) -> int:
    """The integer; one with more than MAX_DIGITS as another that is out of range as well."""
    return int(digits) if len(digits) <= MAX_DIGITS else 10**MAX_DIGITS
