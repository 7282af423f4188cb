"""Merge a version into its base, in the background, and tell whether that is possible and done. It
knows no torch.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from adapters import jobs
from adapters.models import AdapterVersion, Stage, Work
from training.datasets.preview import held_out_prompts
from training.errors import Conflict
from training.people.models import User

KIND = "merge"
PROMPTS, FEWEST = 8, 4
# For a version without data, or with next to none: what anybody might ask.
COMMON = [
    [{"role": "user", "content": words}]
    for words in (
        "What can you do?",
        "Write a short greeting.",
        "turn on the kitchen lamp",
        "List the files of this folder.",
    )
]


def merge_version(user: User, version: AdapterVersion) -> Work:
    """Begin to merge, or tell of the merge that is under way or done.

    Raises:
        Conflict: its method cannot be merged; the sentence says why.
    """
    if version.method_row.no_merge:
        raise Conflict(
            f"{version.method_row.title} cannot be merged. {version.method_row.no_merge}",
            field="merge",
        )
    return jobs.begin(user, KIND, str(version.pk), version=version)


def do_merge(task: Work) -> Generator[dict[str, Any], None, None]:
    version = task.version
    assert version is not None
    order = {
        "base": str(version.base_model.folder),
        "adapter": str(version.folder),
        "method": version.method,
        "target": str(version.merged_folder),
        "prompts": prompts_of(version),
    }
    yield from jobs.follow("adapters.programs.merge", task.folder, order)


def prompts_of(version: AdapterVersion) -> list[list[dict[str, str]]]:
    """What parity is checked with: held-out prompts of its data, and common ones where those are
    few.
    """
    drawn = held_out_prompts(version.data, PROMPTS) if version.data else []
    return [row["messages"] for row in drawn] + COMMON[: max(0, FEWEST - len(drawn))]


def is_merged(version: AdapterVersion) -> bool:
    """Is its merged model there, checked and whole?"""
    return (
        Work.objects.filter(kind=KIND, key=str(version.pk), stage=Stage.DONE).exists()
        and version.merged_folder.is_dir()
    )
