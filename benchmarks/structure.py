"""The structure of the code at two commits: imports, cycles, longest chain, files per folder, line
width.

    python benchmarks/structure.py [OLD [NEW]] [--json]

OLD defaults to the last commit before the restructuring, NEW to the working tree. Tests and
migrations are left out. An import counts wherever it stands: at the top, inside a function, or
under TYPE_CHECKING.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import statistics
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import quantile

ROOT = Path(__file__).parent.parent
BASELINE = "300766d"
PACKAGES = ("training", "adapters", "snapml_site")

Graph = dict[str, set[str]]
Figures = dict[str, float | int | str]
Measure = Callable[[Path], Figures]


def source_files(root: Path) -> Iterator[Path]:
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            if "migrations" not in path.parts:
                yield path


def module_name(path: Path, root: Path) -> str:
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def import_graph(root: Path) -> Graph:
    """The imports between files, by module name. Empty `__init__.py` files are left out."""
    files = {module_name(path, root): path for path in source_files(root)}
    graph: Graph = {
        name: set()
        for name, path in files.items()
        if path.stat().st_size or path.name != "__init__.py"
    }
    for name in graph:
        tree = ast.parse(files[name].read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            imported_names: list[str] = []
            if isinstance(node, ast.Import):
                imported_names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                imported_names = [f"{node.module}.{alias.name}" for alias in node.names]
            for target in imported_names:
                module = target if target in files else target.rpartition(".")[0]
                if module in graph and module != name:
                    graph[name].add(module)
    return graph


def find_cycles(graph: Graph) -> list[list[str]]:
    """Strongly connected components of more than one file (Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    cycles: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in sorted(graph[node]):
            if target not in index:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], index[target])
        if low[node] == index[node]:
            component: list[str] = []
            while not component or component[-1] != node:
                component.append(stack.pop())
            if len(component) > 1:
                cycles.append(sorted(component))

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return cycles


def longest_chain(graph: Graph) -> int:
    """Files on the longest chain of imports; a cycle counts as one file."""
    representative = {name: name for name in graph}
    for cycle in find_cycles(graph):
        representative |= dict.fromkeys(cycle, cycle[0])
    merged: Graph = defaultdict(set)
    for name, targets in graph.items():
        merged[representative[name]] |= {representative[target] for target in targets} - {
            representative[name]
        }

    @cache
    def depth(node: str) -> int:
        return 1 + max((depth(target) for target in merged[node]), default=0)

    return max(depth(node) for node in list(merged))


def measure_structure(root: Path) -> Figures:
    graph = import_graph(root)
    cycles = find_cycles(graph)
    folders = Counter(path.parent for path in source_files(root) if path.name != "__init__.py")
    largest, files = folders.most_common(1)[0]
    widths = [
        len(line)
        for path in source_files(root)
        for line in path.read_text(encoding="utf-8").splitlines()
        if line.strip()
    ]
    templates = [
        len(line)
        for path in (root / "templates").rglob("*.html")
        for line in path.read_text(encoding="utf-8").splitlines()
        if line.strip()
    ]
    return {
        "files": len(graph),
        "imports between files": sum(map(len, graph.values())),
        "import cycles": len(cycles),
        "files in cycles": sum(map(len, cycles)),
        "longest chain of imports": longest_chain(graph),
        "folders": len(folders),
        "files per folder, median": statistics.median(folders.values()),
        "files per folder, most": f"{files} ({largest.relative_to(root)})",
        "lines": len(widths),
        "line width, p90": quantile(widths, 0.9),
        "line width, most": max(widths),
        "template line width, p90": quantile(templates, 0.9),
        "template line width, most": max(templates),
    }


def measure_commit(measure: Measure, commit: str) -> Figures:
    archive = subprocess.run(
        ["git", "archive", commit], cwd=ROOT, capture_output=True, check=True
    ).stdout
    with tempfile.TemporaryDirectory() as folder, tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(folder, filter="data")
        return measure(Path(folder))


def compare_commits(measure: Measure, baseline: str, description: str) -> None:
    """Print the figures of two commits side by side, as a table or as JSON."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", nargs="?", default=baseline)
    parser.add_argument("new", nargs="?", help="the working tree if left out")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    before = measure_commit(measure, options.old)
    after = measure_commit(measure, options.new) if options.new else measure(ROOT)
    if options.json:
        print(json.dumps({"before": before, "after": after}))
        return
    print(f"| | {options.old} | {options.new or 'now'} |\n|---|---|---|")
    for name in before:
        print(f"| {name} | {before[name]} | {after[name]} |")


if __name__ == "__main__":
    compare_commits(measure_structure, BASELINE, __doc__)
