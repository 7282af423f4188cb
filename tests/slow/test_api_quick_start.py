"""The two programs of docs/api.md run as they are printed, against a real server."""

import json
import os
import re
import subprocess
import sys

import pytest

from tests import tiny
from tests.running_site import ROOT, RunningSite

pytestmark = pytest.mark.slow
COMMANDS = {"bash": ["bash", "-euo", "pipefail", "-c"], "python": [sys.executable, "-c"]}


@pytest.fixture(scope="module")
def site(tmp_path_factory, tiny_model):
    with RunningSite(tmp_path_factory.mktemp("home"), tiny_model) as running:
        yield running


@pytest.mark.parametrize("language", COMMANDS)
def test_the_quick_start_uploads_trains_deploys_and_asks(site, language, tmp_path):
    (tmp_path / "lights.jsonl").write_bytes(b"".join(tiny.encode_jsonl(tiny.ROWS)))
    text = (ROOT / "docs" / "api.md").read_text()
    (program,) = re.findall(rf"```{language}\n(.+?)```", text, re.DOTALL)
    result = subprocess.run(
        [*COMMANDS[language], program],
        cwd=tmp_path,
        env={**os.environ, "SNAPML_URL": site.address, "SNAPML_TOKEN": site.token},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    if language == "bash":
        answer = json.loads(result.stdout)
        assert answer["model"] == "lights" and answer["usage"]["completion_tokens"] > 0
    newest = site.call_api("GET", "/runs")["items"][0]
    assert newest["state"]["state"] == "finished" and newest["config"]["rank"] == 16
