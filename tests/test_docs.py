"""The documents keep up with the code."""

from dataclasses import fields
from pathlib import Path

from training.datasets.column_mapping import ROW_FORMATS
from training.engine.config import RunConfig
from training.runs.launch.services import INTERNAL_SETTINGS

DOCS = Path(__file__).parent.parent / "docs"


def test_every_setting_is_explained_with_its_own_sentence():
    text = (DOCS / "settings.md").read_text()
    for field in fields(RunConfig):
        if field.name not in INTERNAL_SETTINGS:
            assert f"| `{field.name}` |" in text
            assert field.metadata["description"] in text


def test_every_form_of_data_has_an_example():
    text = (DOCS / "data.md").read_text().lower()
    for title in ROW_FORMATS.values():
        assert title.split(" (")[0].replace(" conversations", "").lower() in text, title
