"""`python -m adapters.programs.hub_push FOLDER`: files as one commit to a hub's repository.
HF_TOKEN says who pushes.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import httpx
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError

from training.child_process import emit_message, main, read_params
from training.errors import UserError
from training.formatting import format_bytes

# What the hub's words for it leave open.
HINTS = {
    401: "It does not know this token.",
    403: "This token may not write there; it needs the right to write to that owner's "
    "repositories.",
    404: "There is no such owner, or this token may not see it.",
}


def push_files(params: dict[str, Any]) -> dict[str, Any]:
    """Order: repository, private, message, card (text), files (name -> path). Result: the
    repository's address and the commit.

    A repository that is there already stays as public as it is.
    """
    repository = params["repository"]
    api = HfApi(token=os.environ["HF_TOKEN"])
    operations = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=path)
        for name, path in params["files"].items()
    ]
    if params["card"]:
        operations.append(
            CommitOperationAdd(path_in_repo="README.md", path_or_fileobj=params["card"].encode())
        )
    try:
        emit_message(message="asking the hub")
        repository_url = api.create_repo(repository, private=params["private"], exist_ok=True)
        emit_message(
            message=f"sending {format_bytes(sum(one.upload_info.size for one in operations))}"
        )
        commit = api.create_commit(repository, operations, commit_message=params["message"])
    except HfHubHTTPError as error:
        code = error.response.status_code
        raise UserError(
            f"The hub refused {repository} ({code}). "
            f"{HINTS.get(code) or (error.server_message or '')[:200]}"
        ) from error
    except (httpx.HTTPError, ConnectionError) as error:
        raise UserError(
            f"The hub cannot be reached ({type(error).__name__}); nothing was pushed."
        ) from error
    except (
        RuntimeError,
        ValueError,
    ) as error:  # a file that did not get through; a card that the hub's check refuses
        raise UserError(f"The hub did not take it: {str(error)[:300]}") from error
    return {"address": str(repository_url), "commit": commit.oid}


if __name__ == "__main__":
    sys.exit(main(lambda: emit_message(result=push_files(read_params()))))
