"""The two example datasets that come with SnapML."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from training.datasets.models import Dataset, DatasetVersion
from training.datasets.upload_job import create_dataset
from training.errors import NotFound
from training.people.models import User

EXAMPLES_FOLDER = Path(__file__).parent / "example_files"


@dataclass(frozen=True)
class Example:
    key: str
    title: str
    description: str
    license: str

    @property
    def source(self) -> str:
        return f"example: {self.key}"


EXAMPLES = {
    example.key: example
    for example in (
        Example(
            "smart_home",
            "Smart home",
            "Turns spoken commands into JSON intents: 2,322 training, 148 held-out and 488 test "
            "rows.",
            "Apache-2.0 (derived from home-assistant-intents)",
        ),
        Example(
            "shell_commands",
            "Shell commands",
            "Turns descriptions into shell commands: 924 training, 80 held-out and 200 test rows.",
            "MIT (derived from cheat and eg)",
        ),
    )
}


def add_example(user: User, key: str) -> DatasetVersion:
    """Create the user's own copy of an example, or return the version of the copy that exists.

    Raises:
        NotFound: no example of that name.
    """
    example = EXAMPLES.get(key)
    if example is None:
        raise NotFound(f"Example {key!r} not found. Available: {', '.join(EXAMPLES)}.")
    existing = Dataset.objects.filter(owner=user, source=example.source).first()
    if existing is not None:
        return DatasetVersion.objects.filter(dataset=existing).latest("number")
    with (EXAMPLES_FOLDER / f"{key}.jsonl").open("rb") as lines:
        return create_dataset(
            user, example.title, lines, source=example.source, license=example.license
        )
