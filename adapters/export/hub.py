"""Push a version to the Hugging Face Hub in the background. The access token is only passed to the
push program and is deleted when the push starts.
"""

from __future__ import annotations

import re
from typing import Any

from adapters.export import gguf
from adapters.lanes import PROGRAMS
from adapters.models import AdapterVersion
from adapters.registry.model_card import CARD_FILE, format_card_for_hub
from training.catalog.models import Source
from training.child_process import GIB, NETWORK_VARIABLES, ProgramLimits, child_environment
from training.errors import UserError
from training.jobs.kinds import JobKind
from training.jobs.models import Job, JobState
from training.jobs.runner import get_subject, run_program, save_job
from training.jobs.services import enqueue_job, get_job
from training.people.models import User

KIND = "push"
LIMITS = ProgramLimits(address_space_bytes=4 * GIB, counted_bytes=GIB)
PUSH_CONTENTS = {"adapter": "the adapter", "merged": "the merged model"}
# The Hub's limit is 96 characters
REPOSITORY_PATTERN = re.compile(r"(?=.{3,96}$)[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
TOKEN_PATTERN = re.compile(r"[!-~]{8,200}")


def push_to_hub(
    user: User,
    version: AdapterVersion,
    *,
    repository: str,
    token: str,
    what: str = "adapter",
    private: bool = True,
) -> Job:
    """Start to push a version's files to `owner/name` on the Hub, or return the push that is
    running.

    Raises:
        UserError: an invalid value, with its field.
        Conflict: the version has no merged model; the message says why or what to do.
    """
    check_destination(repository, what)
    if not TOKEN_PATTERN.fullmatch(token):
        raise UserError(
            "Enter a Hub access token with write permission. It is deleted when the push starts.",
            field="token",
        )
    if what == "merged":
        gguf.get_model_folder(version)
    key = f"{version.pk}:{what}:{repository}"
    params = {"repository": repository, "what": what, "private": private, "token": token}
    restart = (JobState.DONE, JobState.FAILED)  # a second push runs again
    return enqueue_job(user, KIND, key, subjects=[version], params=params, restart=restart)


def get_push_job(version: AdapterVersion, repository: str, what: str) -> Job:
    """The last push to this repository, whatever its state.

    Raises:
        UserError: an invalid value, with its field.
        NotFound: no such push was started.
    """
    check_destination(repository, what)
    return get_job(KIND, f"{version.pk}:{what}:{repository}")


def check_destination(repository: str, what: str) -> None:
    """Raises UserError: an invalid value, with its field."""
    if not REPOSITORY_PATTERN.fullmatch(repository):
        raise UserError(
            f"{repository[:80]!r} is not a repository name. Use `owner/name`.",
            field="repository",
        )
    if what not in PUSH_CONTENTS:
        raise UserError(f"what must be one of {', '.join(PUSH_CONTENTS)}.", field="what")


def run_push(job: Job) -> dict[str, Any]:
    version = get_subject(job, AdapterVersion, "base_model")
    assert version is not None
    token = job.params.pop("token", "")
    save_job(job, params=job.params)  # remove the token from the database
    if not token:
        raise UserError("The push was interrupted and its token was deleted. Push again.")
    folder = version.folder if job.params["what"] == "adapter" else gguf.get_model_folder(version)
    card = version.folder / CARD_FILE
    base = version.base_model.location if version.base_model.source == Source.HUB else ""
    params = job.params | {
        "files": {
            path.name: str(path) for path in sorted(folder.iterdir()) if path.name != CARD_FILE
        },
        "card": format_card_for_hub(card.read_text(), base, merged=job.params["what"] == "merged")
        if card.is_file()
        else "",
        "message": f"{version}, from SnapML",
    }
    environment = child_environment(*NETWORK_VARIABLES) | {"HF_TOKEN": token}
    environment.setdefault("HF_HUB_OFFLINE", "0")
    return run_program(
        job, "adapters.programs.hub_push", params, limits=LIMITS, environment=environment
    )


PUSH_JOB = JobKind(KIND, run_push, lane=PROGRAMS, subjects=(AdapterVersion,))
