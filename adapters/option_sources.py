"""Options of selects: adapter versions and prompt sets."""

from typing import Any

from adapters.models import AdapterVersion, PromptSet
from training.people.models import User
from training.people.options import Option, OptionSource


def find_versions(user: User, text: str) -> Any:
    versions = AdapterVersion.objects.visible_to(user).filter(name__icontains=text)
    return versions.select_related("base_model").defer(
        "provenance", "files", "base_model__metadata"
    )


def to_version_option(version: AdapterVersion) -> Option:
    return Option(str(version.pk), f"{version} · {version.base_model.name}")


def find_prompt_sets(user: User, text: str) -> Any:
    return PromptSet.objects.visible_to(user).filter(name__icontains=text).defer("rows")


def to_prompt_set_option(prompts: PromptSet) -> Option:
    return Option(str(prompts.pk), prompts.name)


ADAPTER_VERSIONS = OptionSource("adapter-versions", find_versions, to_version_option)
PROMPT_SETS = OptionSource("prompt-sets", find_prompt_sets, to_prompt_set_option)
