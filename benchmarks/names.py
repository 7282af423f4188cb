"""Names and line width at two commits: words per function name, lines above 100 columns, and words
of the old private vocabulary.

    python benchmarks/names.py [OLD [NEW]] [--json]

OLD defaults to the last commit before the renames, NEW to the working tree. Migrations are left
out; tests and benchmarks count for their line width only. Methods, properties and nested functions
count as functions, special methods such as `__init__` do not. `told`, `kept_rows` and
`refuse_types` are three old words.
"""

from __future__ import annotations

import ast
import io
import re
import statistics
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.structure import Figures, compare_commits, source_files

BASELINE = "3fef8ea"
MAX_COLUMNS = 100
# Words of the old vocabulary, wherever they stand in an identifier, and as parts of names.
OLD_WORDS = frozenset(
    {"refuse", "told", "said", "asked", "given", "words", "place", "places", "held", "mark"}
    | {"found", "kept", "cut", "taken", "gone", "spared", "usual"}
)
# Names that libraries and the field have fixed: HTTP's 404, held-out data, transformers' do_sample,
# and the marks of PyYAML's errors and Django's mark_safe
STANDARD_NAMES = re.compile(
    r"NotFound|not_found|NOT_FOUND|held_out|do_sample|problem_mark|start_mark|mark_safe"
)
OLD_NAME = re.compile(r"_*(do_\w+|\w+_of|(MOST|LEAST|FEWEST|LONGEST)_\w+)")


def split_identifier(name: str) -> list[str]:
    """`loadModelX` and `load_model_x` are the same three words."""
    return [
        word.lower()
        for part in name.split("_")
        for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z0-9]+", part)
    ]


def function_names(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name[:2] != "__":
            yield node.name


def old_words(text: str) -> Iterator[str]:
    """The words of the old vocabulary in the identifiers of a file, one for each use."""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type != tokenize.NAME:
            continue
        name = STANDARD_NAMES.sub("", token.string)
        yield from OLD_WORDS.intersection(split_identifier(name))
        if OLD_NAME.fullmatch(name):
            yield name


def measure_names(root: Path) -> Figures:
    names: list[str] = []
    words: Counter[str] = Counter()
    for path in source_files(root):
        text = path.read_text(encoding="utf-8")
        names += function_names(ast.parse(text))
        words.update(old_words(text))
    sizes = [len(split_identifier(name)) for name in names]
    figures: Figures = {
        "functions": len(names),
        "words per function name, mean": round(statistics.mean(sizes), 2),
        "function names of one word, %": round(100 * sizes.count(1) / len(sizes), 1),
        "old words": words.total(),
        "old words, most often": ", ".join(f"{word} {n}" for word, n in words.most_common(8)),
    }
    for title, folders, pattern in (
        ("Python", ("training", "adapters", "snapml_site", "tests", "benchmarks"), "*.py"),
        ("template", ("templates",), "*.html"),
        ("JavaScript", ("static/js", "tests/js"), "*.*js"),
        ("CSS", ("static/css",), "*.css"),
    ):
        lines = [
            line
            for folder in folders
            for path in (root / folder).rglob(pattern)
            if "migrations" not in path.parts and ".min." not in path.name
            for line in path.read_text(encoding="utf-8").splitlines()
        ]
        wide = sum(len(line) > MAX_COLUMNS for line in lines)
        figures[f"{title} lines above {MAX_COLUMNS} columns, %"] = round(
            100 * wide / max(1, len(lines)), 2
        )
    return figures


if __name__ == "__main__":
    compare_commits(measure_names, BASELINE, __doc__)
