"""Checks the import rules of ARCHITECTURE.md: imports point in one direction, torch stays in its
programs, and there are no import cycles.
"""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.structure import find_cycles, import_graph

ROOT = Path(__file__).parent.parent
# A package may import from its own group and from earlier ones.
IMPORT_ORDER = [
    {
        "training.errors",
        "training.text_input",
        "training.formatting",
        "training.engine",
        "training.child_process",
        "training.child_slots",
        "training.process_identity",
        "training.sqlite_queue",
        "training.zip_errors",
    },
    {"training.people"},
    {"training.jobs"},
    {
        "training.webhooks",
        "training.catalog",
        "training.datasets",
        "training.auto",
        "training.gpus",
    },
    {"training.runs"},
    {"adapters"},
    {"snapml_site"},
]
APPS = (
    "training.people",
    "training.jobs",
    "training.webhooks",
    "training.catalog",
    "training.datasets",
    "training.gpus",
    "training.runs",
    "adapters",
)
TORCH = {"torch", "transformers", "peft", "bitsandbytes", "safetensors", "accelerate"}
TORCH_PROGRAMS = ("training/engine", "adapters/inference", "adapters/programs")
ENGINE = ROOT / "training/engine"
# Modules of the engine that the site may import: those at its root, and the table of methods,
# which imports torch only inside functions.
TORCH_FREE = {path.stem for path in ENGINE.glob("*.py")} - {"__main__"} | {"methods"}
PURE = (
    "training/datasets/rows.py",
    "training/catalog/metadata.py",
    "training/catalog/safetensors_header.py",
    "training/runs/worker/engine_process.py",
    *(
        f"training/gpus/scheduling/{name}.py"
        for name in ("state", "placement", "scheduler", "preemption", "wait_messages", "eta")
    ),
)
LAYERS = {
    "models": 0,
    "states": 0,
    "tasks": 2,
    "consumers": 2,
    "api": 2,
    "views": 2,
    "urls": 3,
    "apps": 4,
    "main": 4,
}


def iter_sources():
    for top in ("training", "adapters", "snapml_site"):
        yield from (p for p in (ROOT / top).rglob("*.py") if "migrations" not in p.parts)


def iter_imports(path):
    """(module, line, is it at the top level of the file?) of every import."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno, node in tree.body) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                yield f"{node.module}.{alias.name}", node.lineno, node in tree.body


def find_package(module):
    for rank, packages in enumerate(IMPORT_ORDER):
        for name in packages:
            if module == name or module.startswith(name + "."):
                return rank, name
    return None


def get_module_name(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def test_packages_import_only_from_earlier_groups():
    broken = []
    for path in iter_sources():
        source = find_package(get_module_name(path))
        for module, line, _ in iter_imports(path):
            target = find_package(module)
            if (
                source
                and target
                and (
                    target[0] > source[0]
                    or (target[0] == source[0] and target[1] != source[1] and source[0] > 0)
                )
            ):
                broken.append(f"{path.relative_to(ROOT)}:{line} imports {module}")
    assert not broken


def test_the_engine_imports_neither_django_nor_other_packages():
    for path in (ROOT / "training/engine").rglob("*.py"):
        for module, line, _ in iter_imports(path):
            assert not module.startswith(("django", "channels", "huey", "ninja")), f"{path}:{line}"
            assert not module.startswith("training.") or module.startswith(
                (
                    "training.engine",
                    "training.errors",
                    "training.text_input",
                    "training.child_process",
                )
            ), f"{path}:{line}"


def test_there_are_no_import_cycles():
    assert not find_cycles(import_graph(ROOT))


def test_nothing_at_the_root_of_the_engine_imports_torch():
    broken = []
    for path in ENGINE.glob("*.py"):
        for module, line, _ in iter_imports(path):
            below = module.startswith("training.engine.") and module.split(".")[2] not in TORCH_FREE
            if module.split(".")[0] in TORCH or (below and path.stem != "__main__"):
                broken.append(f"{path.relative_to(ROOT)}:{line} imports {module}")
    assert not broken


def test_the_table_of_methods_imports_torch_only_inside_functions():
    for module in import_graph(ROOT)["training.engine.methods"]:
        path = ROOT / f"{module.replace('.', '/')}.py"
        for name, line, top in iter_imports(path):
            assert not top or name.split(".")[0] not in TORCH, f"{path}:{line}"


def test_the_site_imports_only_torch_free_modules_of_the_engine():
    broken = []
    for path in iter_sources():
        if str(path.relative_to(ROOT)).startswith(TORCH_PROGRAMS):
            continue
        for module, line, _ in iter_imports(path):
            parts = module.split(".")
            if parts[0] in TORCH or (
                parts[:2] == ["training", "engine"] and parts[2] not in TORCH_FREE
            ):
                broken.append(f"{path.relative_to(ROOT)}:{line} imports {module}")
    assert not broken


@pytest.mark.parametrize("module", ["snapml_site.asgi", "training.runs.worker.main"])
def test_the_web_and_worker_processes_never_import_torch(module):
    code = f"import sys, django; django.setup(); import {module}; assert 'torch' not in sys.modules"
    env = {**os.environ, "DJANGO_SETTINGS_MODULE": "snapml_site.settings"}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, env=env)


def test_pure_modules_import_no_orm():
    for name in PURE:
        for module, line, _ in iter_imports(ROOT / name):
            assert not module.startswith("django.db"), f"{name}:{line}"
            assert not module.endswith(".models"), f"{name}:{line}"


def get_layer(stem):
    """The layer of a module, by the last word of its name: `launch/views.py` and `quota_views.py`
    are both views.
    """
    return LAYERS.get(stem.rpartition("_")[2], 1)


def test_models_import_no_services_and_services_import_no_views():
    broken = []
    for path in iter_sources():
        module = get_module_name(path)
        app = next((app for app in APPS if module.startswith(app + ".")), None)
        for target, line, _ in iter_imports(path) if app else ():
            imported = (
                target
                if (ROOT / f"{target.replace('.', '/')}.py").exists()
                else target.rpartition(".")[0]
            )
            if imported.startswith(app + ".") and get_layer(
                imported.rpartition(".")[2]
            ) > get_layer(path.stem):
                broken.append(f"{path.relative_to(ROOT)}:{line} imports {target}")
    assert not broken


def test_no_file_is_called_utils():
    assert not [
        path for path in iter_sources() if path.stem in {"utils", "helpers", "common", "misc"}
    ]


def test_broad_excepts_are_few_and_log_or_chain_the_error():
    handlers = []
    for path in iter_sources():
        text = path.read_text()
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.ExceptHandler) or ast.unparse(node.type or node) not in (
                "Exception",
                "BaseException",
            ):
                continue
            body = [part for statement in node.body for part in ast.walk(statement)]
            raised = [part for part in body if isinstance(part, ast.Raise)]
            if any(part.exc is None for part in raised):
                continue  # cleanup code that raises the error again
            logged = any(
                isinstance(part, ast.Attribute) and part.attr == "exception" for part in body
            )
            excused = "noqa: BLE001" in text.splitlines()[node.lineno - 1]
            is_handled = logged or excused or any(part.cause for part in raised)
            handlers.append((f"{path.relative_to(ROOT)}:{node.lineno}", is_handled))
    assert not [location for location, is_handled in handlers if not is_handled]
    assert len(handlers) <= 10


def test_no_test_file_imports_another_one():
    """Shared test code belongs in conftest.py or in a module named by its content."""
    offending = [
        (path.relative_to(ROOT).as_posix(), line)
        for path in (ROOT / "tests").rglob("*.py")
        for line in path.read_text().splitlines()
        if re.match(r"(from|import) tests\.[\w.]*(\btest_|\bconftest\b)", line)
    ]
    assert not offending


def test_prefetches_follow_one_relation():
    """On SQLite, a prefetch through a second relation fails from 1,000 rows on. A Prefetch whose
    queryset has select_related works for any number.
    """
    broken = []
    for path in iter_sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not ast.unparse(node.func).endswith(
                ("prefetch_related", "Prefetch")
            ):
                continue
            broken += [
                f"{path.relative_to(ROOT)}:{node.lineno} follows {argument.value}"
                for argument in node.args
                if isinstance(argument, ast.Constant) and "__" in str(argument.value)
            ]
    assert not broken
