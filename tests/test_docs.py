"""The documentation matches the code."""

import re
import subprocess
from dataclasses import fields
from pathlib import Path

from django.apps import apps

from training.datasets.column_mapping import ROW_FORMATS
from training.engine.config import RunConfig
from training.runs.launch.services import INTERNAL_SETTINGS

DOCS = Path(__file__).parent.parent / "docs"


def test_every_setting_is_documented_with_its_help_text():
    text = (DOCS / "settings.md").read_text()
    for field in fields(RunConfig):
        if field.name not in INTERNAL_SETTINGS:
            assert f"| `{field.name}` |" in text
            assert field.metadata["description"] in text


def test_every_row_format_has_an_example():
    text = (DOCS / "data.md").read_text().lower()
    for title in ROW_FORMATS.values():
        name = re.split(r" \(|:| conversations", title)[0]
        assert name.lower() in text, title


APPS = ("people", "jobs", "webhooks", "catalog", "datasets", "gpus", "runs", "adapters")
OWNERSHIP = {"owner", "team"}


def test_the_data_model_names_every_table_and_every_foreign_key():
    from training.people.models import Owned

    text = (DOCS / "data-model.md").read_text()
    drawn = set(re.findall(r"^    (\w+) [|o}{-]+ (\w+) : (\w+)$", text, re.MULTILINE))
    models = [model for app in APPS for model in apps.get_app_config(app).get_models()]
    assert drawn == {
        (field.related_model.__name__, model.__name__, field.name)
        for model in models
        for field in model._meta.concrete_fields
        if field.is_relation
        and field.related_model in models
        and not (issubclass(model, Owned) and field.name in OWNERSHIP)
    }
    for model in models:
        assert f"`{model.__name__}`" in text, model


# TRL is no dependency: these fields of SFTConfig (1.16) are not in transformers' TrainingArguments.
SFT_CONFIG_FIELDS = {"max_length", "packing", "completion_only_loss"}
CALLBACK_ARGUMENTS = {"early_stopping_patience", "loraplus_lr_ratio"}


def test_a_setting_that_trl_or_peft_has_too_has_their_name():
    from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig
    from transformers import TrainingArguments

    configs = (TrainingArguments, LoraConfig, PrefixTuningConfig, PromptTuningConfig)
    known = {field.name for config in configs for field in fields(config)}
    known |= SFT_CONFIG_FIELDS | CALLBACK_ARGUMENTS
    rows = re.findall(
        r"^\| `(\w+)` \| ([^|]+) \|", (DOCS / "settings.md").read_text(), re.MULTILINE
    )
    table = {name: column for name, column in rows if name in RunConfig.__dataclass_fields__}
    assert set(table) == {f.name for f in fields(RunConfig)} - set(INTERNAL_SETTINGS)
    for name, column in table.items():
        assert column.startswith("same") == (name in known), name
        if name not in known:
            assert set(re.findall(r"`(\w+)`", column)) <= known, name


def test_the_first_change_still_applies():
    (diff,) = re.findall(r"```diff\n(.+?)```", (DOCS / "first-change.md").read_text(), re.DOTALL)
    checked = subprocess.run(
        ["git", "apply", "--check", "-"],
        cwd=DOCS.parent,
        input=diff,
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.returncode == 0, checked.stderr


def test_links_between_documents_lead_to_files():
    for path in [*DOCS.rglob("*.md"), *DOCS.parent.glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text()):
            assert (path.parent / target).exists(), (path.name, target)


def test_files_that_documents_name_exist():
    """`training/...py` in backticks; ARCHITECTURE.md shortens them by their package."""
    for path in [*DOCS.glob("*.md"), *DOCS.parent.glob("*.md")]:
        for name in re.findall(
            r"`((?:training|adapters|snapml_site|tests|static)/[\w/.]+\.\w+)`", path.read_text()
        ):
            assert (DOCS.parent / name).exists(), (path.name, name)
