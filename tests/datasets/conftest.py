"""Uploads are read in the process of the tests, quicker by a second of imports for every job."""

import contextlib
import io
import json
import subprocess
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def reading_here(request, monkeypatch):
    """Not where a test is marked `own_process`: that asks for limits, or for the program itself."""
    if request.node.get_closest_marker("own_process"):
        return
    from training.datasets import program

    def run(act, folder):
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            code = program.run(act, folder, json.loads((folder / "order.json").read_text()))
        return code, out.getvalue()

    def run_child(_module, act, folder, **_limits):
        code, out = run(act, Path(folder))
        return subprocess.CompletedProcess([act], code, out, "")

    def follow_child(command, _log, **_environment):
        act, folder = command[-2:]
        _, out = run(act, Path(folder))
        yield from map(json.loads, out.splitlines())

    monkeypatch.setattr("training.datasets.intake.run_child", run_child)
    monkeypatch.setattr("training.datasets.work.follow_child", follow_child)
