"""Style checks that ruff has no rule for: `python -m tests.style`. `make lint` runs it.

No nested conditional expressions, and no function longer than 60 lines.
"""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = ("training", "adapters", "snapml_site", "benchmarks")
MAX_LINES = 60


def find_faults(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.IfExp):
            if any(isinstance(part, ast.IfExp) for part in (node.test, node.body, node.orelse)):
                yield node.lineno, "nested conditional expression"
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = node.end_lineno - node.lineno + 1
            if lines > MAX_LINES:
                yield node.lineno, f"{node.name} has {lines} lines, more than {MAX_LINES}"


def main():
    has_faults = False
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            if "migrations" in path.parts:
                continue
            for line, fault in find_faults(path):
                print(f"{path.relative_to(ROOT)}:{line}: {fault}")
                has_faults = True
    return int(has_faults)


if __name__ == "__main__":
    sys.exit(main())
