"""Read and write YAML so that every value means what a reader sees.

YAML 1.1 reads `010` as 8, `0x10` as 16, `0b1` as 1, `1_000` as 1000, `1:30` as 90, `2026-01-01` as
a date and `1e-3` as text. Here a number is decimal, with or without an exponent, and the others are
text, so a numeric setting refuses them. No HTTP and no ORM here.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Hashable
from typing import Any

import yaml

from training import child_process
from training.child_process import emit_message
from training.errors import UserError
from training.text_input import InvalidInput, check_value, parse_int

MAX_CHARACTERS = 64_000
MAX_DEPTH = 20  # a run needs 3; PyYAML's time grows with the square of the depth
# Read as text as written: a name may be `no`, `1e5` or `1.10`, and a digest may have only digits.
TEXT_KEYS = frozenset({"name", "model", "data", "pool", "priority", "sha256", "goal"})
START_TOKENS = (
    yaml.FlowSequenceStartToken,
    yaml.FlowMappingStartToken,
    yaml.BlockSequenceStartToken,
    yaml.BlockMappingStartToken,
)
END_TOKENS = (yaml.FlowSequenceEndToken, yaml.FlowMappingEndToken, yaml.BlockEndToken)
NULL_TAG, BOOL_TAG, INT_TAG, FLOAT_TAG = (
    f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float")
)
RESOLVERS = (
    (NULL_TAG, r"~|null|Null|NULL|", "~nN"),
    (BOOL_TAG, r"(?i:yes|no|true|false|on|off)", "yYnNtTfFoO"),
    (INT_TAG, r"[-+]?(0|[1-9][0-9]*)", "-+0123456789"),
    (
        FLOAT_TAG,
        r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+0123456789.",
    ),
)


class Loader(yaml.SafeLoader):
    """PyYAML's loader with decimal numbers, text keys as written, and no duplicate keys."""

    yaml_implicit_resolvers: dict[str, list[Any]] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        mapping: dict[Hashable, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(
                    problem="a key must be a single word", problem_mark=key_node.start_mark
                )
            key = key_node.value
            if key in mapping:
                raise yaml.MarkedYAMLError(
                    problem=f"the key `{key[:40]}` occurs twice", problem_mark=key_node.start_mark
                )
            is_text = (
                key in TEXT_KEYS
                and isinstance(value_node, yaml.ScalarNode)
                and value_node.tag != NULL_TAG
            )
            mapping[key] = (
                value_node.value if is_text else self.construct_object(value_node, deep=True)
            )
        return mapping


class Dumper(yaml.SafeDumper):
    """Quotes a text that any YAML version would read as a number."""


for tag, pattern, first_characters in RESOLVERS:
    compiled = re.compile(rf"(?:{pattern})$")
    Loader.add_implicit_resolver(tag, compiled, [*first_characters, *([""] * (tag == NULL_TAG))])
    Dumper.add_implicit_resolver(tag, compiled, list(first_characters))
Loader.add_constructor(INT_TAG, lambda _loader, node: parse_int(node.value))


def dump_yaml(document: dict[str, Any]) -> str:
    return str(yaml.dump(document, Dumper=Dumper, sort_keys=False, allow_unicode=True))


def load_yaml(text: str) -> Any:
    """The value of a YAML text.

    Raises:
        UserError: it is not valid YAML, or it has a value that cannot be stored. The message names
            the line or the field.
    """
    try:
        check_yaml_features(text)
        value = yaml.load(text, Loader)  # noqa: S506  a subclass of SafeLoader
        check_value(value, "The file")
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"Line {line} is not valid YAML: {error.problem}.", field="file") from error
    except InvalidInput as error:
        raise UserError(error.message, field="file", code=error.code) from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise UserError(f"The file is not valid YAML: {str(error)[:200]}", field="file") from error
    return value


def main() -> None:
    """Load the text on standard input and print its value as a message."""
    emit_message(value=load_yaml(sys.stdin.read()))


def check_yaml_features(text: str) -> None:
    """Raises UserError: the file uses aliases or tags, or is nested too deeply."""
    depth = 0
    for token in yaml.scan(text):
        if isinstance(token, yaml.TagToken):
            raise UserError(
                "The file uses YAML tags (`!name`). Remove them.", field="file", code="yaml_tag"
            )
        if isinstance(token, yaml.AliasToken):
            raise UserError(
                "The file uses YAML aliases (`*name`). Write the values out.",
                field="file",
                code="yaml_alias",
            )
        depth += isinstance(token, START_TOKENS) - isinstance(token, END_TOKENS)
        if depth > MAX_DEPTH:
            raise UserError("The file is nested too deeply.", field="file", code="yaml_depth")


if __name__ == "__main__":
    sys.exit(child_process.main(main))
