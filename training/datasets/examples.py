"""The two data sets that come with SnapML."""

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
            "A spoken command becomes a JSON intent: 2,322 rows to train on, 148 held out, 488 to "
            "test.",
            "Apache-2.0 (derived from home-assistant-intents)",
        ),
        Example(
            "shell_commands",
            "Shell commands",
            "A description becomes one shell command: 924 rows to train on, 80 held out, 200 to "
            "test.",
            "MIT (derived from cheat and eg)",
        ),
    )
}


def add_example(user: User, key: str) -> DatasetVersion:
    """The person's own copy of an example; a second click gives the first one's version again.

    Raises:
        NotFound: no example of that name.
    """
    example = EXAMPLES.get(key)
    if example is None:
        raise NotFound(f"There is no example {key!r}; there are {', '.join(EXAMPLES)}.")
    existing = Dataset.objects.filter(owner=user, source=example.source).first()
    if existing is not None:
        return DatasetVersion.objects.filter(dataset=existing).latest("number")
    with (EXAMPLES_FOLDER / f"{key}.jsonl").open("rb") as lines:
        return create_dataset(
            user, example.title, lines, source=example.source, license=example.license
        )
