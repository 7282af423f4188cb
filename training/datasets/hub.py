"""Downloads a dataset from the Hugging Face Hub, as the Parquet files that the Hub makes of every
public dataset. No loading script is ever run.

Only `program.py` calls this, and without a token: users get what the Hub shows to the public.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from training.datasets.rows import find_split
from training.errors import NotFound, TooLarge, UserError, find_storage_error

HUB_ID = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?")
REVISION = "refs/convert/parquet"
PREFERRED_CONFIGURATIONS = ("default", "main", "plain_text")


def check_hub_id(hub_id: str) -> str:
    if not HUB_ID.fullmatch(hub_id) or hub_id.startswith(("-", ".")):
        raise UserError(
            f"{hub_id[:80]!r} is not a Hub id; expected the form `owner/dataset`.", field="hub_id"
        )
    return hub_id


def download_dataset(
    hub_id: str, folder: Path, *, max_bytes: int, report_progress: Callable[[float, str], None]
) -> list[dict[str, Any]]:
    """Download the Parquet files of one configuration into `folder`. Returns their names and
    splits.

    Raises:
        NotFound: no such dataset, or it has no Parquet files.
        TooLarge: more than `max_bytes` in total; nothing is downloaded.
        UserError: the Hub cannot be reached.
    """
    from huggingface_hub import hf_hub_download

    remote_files = list_files(hub_id)
    sizes = {
        entry.rfilename: int(entry.size or 0)
        for entry in remote_files
        if entry.rfilename.endswith(".parquet")
    }
    chosen = select_configuration(list(sizes))
    if not chosen:
        raise NotFound(f"{hub_id} has no Parquet files.", field="hub_id")
    total = sum(sizes[path] for path in chosen)
    if total > max_bytes:
        raise TooLarge(
            f"{hub_id} has {total / 2**20:,.0f} MiB; at most {max_bytes / 2**20:,.0f} MiB are "
            "allowed (by SNAPML_DATA_MAX_GIB and your disk quota).",
            field="hub_id",
        )
    files: list[dict[str, Any]] = []
    downloaded_bytes = 0
    for number, path in enumerate(chosen):
        report_progress(downloaded_bytes / max(1, total), f"downloading {path}")
        local_path = hf_hub_download(
            hub_id,
            path,
            repo_type="dataset",
            revision=REVISION,
            local_dir=folder / "hub",
            token=False,
        )
        shutil.move(local_path, folder / str(number))
        downloaded_bytes += sizes[path]
        files.append({"file": str(number), "name": path[-100:], "split": split_from_path(path)})
    shutil.rmtree(folder / "hub", ignore_errors=True)
    return files


def list_files(hub_id: str) -> list[Any]:
    """The files of a dataset's Parquet branch, with their sizes.

    Raises:
        NotFound: no such dataset.
        UserError: the Hub cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    api = HfApi(token=False)
    try:
        info = api.dataset_info(
            check_hub_id(hub_id), revision=REVISION, files_metadata=True, timeout=20
        )
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise NotFound(
            f"The Hub has no public dataset {hub_id} with Parquet files.", field="hub_id"
        ) from error
    except UserError:
        raise
    except Exception as error:  # huggingface_hub passes on any network error
        if find_storage_error(error):
            raise
        raise UserError(
            f"The Hugging Face Hub cannot be reached: {str(error)[:200]}", field="hub_id"
        ) from error
    return list(info.siblings or [])


def split_from_path(path: str) -> str:
    """The split (train, eval or test) that a file's folder names; empty for any other split, such
    as `unsupervised`, whose files are skipped.
    """
    return find_split(Path(path).parent.name)


def select_configuration(paths: list[str]) -> list[str]:
    """The files of one configuration: `default` or a similar name if there is one, otherwise the
    first by name.
    """
    names = sorted({path.split("/")[0] for path in paths})
    chosen = next(
        (name for name in PREFERRED_CONFIGURATIONS if name in names), names[0] if names else ""
    )
    selected = sorted(
        path for path in paths if path.split("/")[0] == chosen and split_from_path(path)
    )
    # The preview shows the first file
    return sorted(selected, key=lambda path: split_from_path(path) != "train")
