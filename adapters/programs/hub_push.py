"""`python -m adapters.programs.hub_push FOLDER`: push files to a Hub repository in one commit, with
the token in HF_TOKEN.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import httpx
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError

from training.child_process import emit_message, main, read_params
from training.errors import UserError, find_storage_error
from training.formatting import format_bytes

# Clearer than the Hub's own messages.
HINTS = {
    401: "The token is invalid.",
    403: "The token has no write access to this owner's repositories.",
    404: "The owner does not exist, or the token has no access.",
}


def push_files(params: dict[str, Any]) -> dict[str, Any]:
    """Create the repository if needed and push the files.

    Parameters: repository, private, message, card (text), files (name -> path). Result: address and
    commit. `private` does not change a repository that exists.
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
        emit_message(message="connecting to the Hub")
        repository_url = api.create_repo(repository, private=params["private"], exist_ok=True)
        emit_message(
            message=f"uploading {format_bytes(sum(one.upload_info.size for one in operations))}"
        )
        commit = api.create_commit(repository, operations, commit_message=params["message"])
    except HfHubHTTPError as error:
        code = error.response.status_code
        raise UserError(
            f"The Hub rejected the push to {repository} (status {code}). "
            f"{HINTS.get(code) or (error.server_message or '')[:200]}"
        ) from error
    except (httpx.HTTPError, ConnectionError) as error:
        raise UserError(
            f"The Hub cannot be reached ({type(error).__name__}). Nothing was pushed."
        ) from error
    except (RuntimeError, ValueError) as error:  # a failed upload; a card that the Hub rejects
        if find_storage_error(error):
            raise
        raise UserError(f"The push failed: {str(error)[:300]}") from error
    return {"address": str(repository_url), "commit": commit.oid}


if __name__ == "__main__":
    sys.exit(main(lambda: emit_message(result=push_files(read_params()))))
