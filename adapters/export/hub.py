"""Push a version to a model hub, in the background. The token lives as long as the push and is told
to nobody but its program.
"""

from __future__ import annotations

import re
from collections.abc import Generator
from typing import Any

from adapters import jobs
from adapters.export import gguf
from adapters.models import AdapterVersion, Stage, Work
from adapters.registry.model_card import NAME, card_for_hub
from training.catalog.models import Source
from training.child_environment import NETWORK, child_environment
from training.errors import UserError
from training.people.models import User

KIND = "push"
WHAT = {"adapter": "the adapter", "merged": "the merged model"}
REPOSITORY = re.compile(
    r"(?=.{3,96}$)[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII
)  # 96 is the hub's own limit
TOKEN = re.compile(r"[!-~]{8,200}")


def push(
    user: User,
    version: AdapterVersion,
    *,
    repository: str,
    token: str,
    what: str = "adapter",
    private: bool = True,
) -> Work:
    """Begin to push a version's files to `owner/name` on the hub, or tell of the push that is under
    way.

    Raises:
        UserError: a value that cannot be, with its field. Conflict: it has no merged model, and why
            or what to do.
    """
    if not REPOSITORY.fullmatch(repository):
        raise UserError(
            f"{repository[:80]!r} is not a repository; it looks like `owner/name`.",
            field="repository",
        )
    if not TOKEN.fullmatch(token):
        raise UserError(
            "Give an access token of the hub that may write; it is forgotten once the push has "
            "begun.",
            field="token",
        )
    if what not in WHAT:
        raise UserError(f"what must be one of {', '.join(WHAT)}.", field="what")
    if what == "merged":
        gguf.model_folder(version)
    key = f"{version.pk}:{what}:{repository}"
    Work.objects.filter(kind=KIND, key=key, stage=Stage.DONE).delete()  # a second push is a push
    order = {"repository": repository, "what": what, "private": private, "token": token}
    return jobs.begin(user, KIND, key, version=version, order=order)


def do_push(task: Work) -> Generator[dict[str, Any], None, None]:
    version = task.version
    assert version is not None
    token = task.order.pop("token", "")
    jobs.write(task, order=task.order)  # the database keeps no token longer than it must
    if not token:
        raise UserError("The push broke off, and its token is forgotten; push again.")
    folder = version.folder if task.order["what"] == "adapter" else gguf.model_folder(version)
    card = version.folder / NAME
    base = version.base_model.location if version.base_model.source == Source.HUB else ""
    order = task.order | {
        "files": {path.name: str(path) for path in sorted(folder.iterdir()) if path.name != NAME},
        "card": card_for_hub(card.read_text(), base, merged=task.order["what"] == "merged")
        if card.is_file()
        else "",
        "message": f"{version}, from SnapML",
    }
    surroundings = {"HF_HUB_OFFLINE": "0"} | child_environment(*NETWORK) | {"HF_TOKEN": token}
    yield from jobs.follow("adapters.programs.hub_push", task.folder, order, surroundings)
