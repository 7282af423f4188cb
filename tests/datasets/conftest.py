"""Uploads are processed in the test process, which saves a second of imports for every job."""

import contextlib
import io
import json
import subprocess
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def run_in_process(request, monkeypatch):
    """Runs program.py in this process, except in tests marked `own_process`, which need its limits
    or the program itself.
    """
    if request.node.get_closest_marker("own_process"):
        return
    from training.child_process import build_error, emit_error
    from training.datasets import program
    from training.errors import UserError

    def run_program(action, folder):
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            try:
                program.run_action(action, folder, json.loads((folder / "params.json").read_text()))
            except UserError as error:
                emit_error(error)
        return out.getvalue()

    def run_child(_module, action, folder, **_limits):
        return subprocess.CompletedProcess([action], 0, run_program(action, Path(folder)), "")

    def stream_child(command, _log, **_environment):
        action, folder = command[-2:]
        for message in map(json.loads, run_program(action, Path(folder)).splitlines()):
            if "error" in message:
                raise build_error(message)
            yield message

    monkeypatch.setattr("training.datasets.uploads.run_child", run_child)
    monkeypatch.setattr("training.jobs.runner.stream_child", stream_child)
