"""Python and JavaScript format numbers equally: both are tested with formatting_cases.json."""

import json
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from training import formatting

ROOT = Path(__file__).parent.parent.parent
CASES = json.loads((ROOT / "tests/site/formatting_cases.json").read_text())


@pytest.mark.parametrize("name", CASES)
def test_numbers_are_formatted_as_in_the_shared_cases(name):
    for values, text in CASES[name]:
        assert getattr(formatting, name)(*values) == text, values


@pytest.mark.parametrize(
    "path", sorted((ROOT / "tests/js").glob("*.test.mjs")), ids=lambda path: path.name
)
def test_the_javascript_modules_pass_their_own_tests(path):
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed; SnapML itself does not need it")
    done = subprocess.run(
        [node, "--test", str(path)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_replies_and_tokens_are_escaped():
    from snapml_site.templatetags import formatting as filters

    markup = "<img src=x>"
    cell = SimpleNamespace(pieces=[(markup, True), (markup, False)], is_empty=False)
    assert markup not in filters.format_reply(cell)
    row = {"spans": [{"kind": "t", "tokens": [markup]}], "more": 2}
    assert markup not in filters.format_token_spans(row)
    assert "&lt;img" in filters.format_token_spans(row)
