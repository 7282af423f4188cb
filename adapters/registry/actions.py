"""What people do to versions on the shelf: tag, note, delete, look where they come from and what
they take of the disk.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from django.db import transaction
from django.db.models import ProtectedError, Q

from adapters.models import AdapterVersion, Deployment
from training.engine.files import remove_tree
from training.errors import Conflict, UserError, check_name_typed
from training.jobs.services import find_job_subjects, find_jobs_about, list_job_folders
from training.people.models import User
from training.people.permissions import check_changeable
from training.runs.actions import normalize_tags
from training.runs.models import MAX_NOTES_LENGTH, Run
from training.runs.states import UNFINISHED

MAX_LINEAGE_NODES = 60
MAX_RUNS, MAX_ROWS = 500, 100
SUGGESTED_TAGS = ("candidate", "production")


def update_version(
    user: User, version: AdapterVersion, *, tags: str | None = None, notes: str | None = None
) -> AdapterVersion:
    """Tag a version (tags come with commas) or write notes to it; None leaves a part as it is.

    Raises:
        NotAllowed: not theirs to change. UserError: too many tags, odd ones, or too long notes.
    """
    check_changeable(user, version)
    if tags is not None:
        version.tags = normalize_tags(tags.split(","))
    if notes is not None:
        if len(notes) > MAX_NOTES_LENGTH:
            raise UserError(f"Notes have at most {MAX_NOTES_LENGTH:,} characters.", field="notes")
        version.notes = notes.replace("\0", "")
    version.save(update_fields=["tags", "notes"])
    return version


def delete_version(user: User, version: AdapterVersion, name: str) -> int:
    """Delete a version with its files, its merged model and what was worked out of it; returns the
    bytes freed.

    Raises:
        UserError: `name` is not its name. Conflict: a deployment answers with it, or a run that has
            not ended begins with it.
    """
    check_changeable(user, version)
    check_name_typed(name, str(version))
    open_run = Run.objects.filter(from_version=version.pk, state__in=UNFINISHED).first()
    if open_run is not None:
        raise Conflict(
            f"Run {open_run.pk}, {open_run.name}, begins with the weights of {version}; let it "
            "end, or stop it first."
        )
    folders = [version.folder]
    for job in find_jobs_about(version):
        folders += list_job_folders(job)
    try:
        with transaction.atomic():
            version.delete()  # and its jobs with it
    except ProtectedError as error:
        names = ", ".join(row.name for row in deployments_using(version))
        raise Conflict(f"{version} answers as {names}; switch or take that down first.") from error
    return sum(remove_tree(folder) for folder in dict.fromkeys(folders))


def deployments_using(version: AdapterVersion) -> list[Deployment]:
    return list(Deployment.objects.filter(Q(version=version) | Q(canary=version)))


@dataclass(frozen=True)
class LineageNode:
    """A version in a lineage: how deep it stands, and whether it is the one that is looked at."""

    version: AdapterVersion
    depth: int
    is_current: bool

    @property
    def indent_levels(self) -> range:
        """As many as it is indented by."""
        return range(self.depth - 1)


def build_lineage(user: User, version: AdapterVersion) -> list[LineageNode]:
    """The tree that a version stands in, parents before children; those that the person may not see
    are left out.
    """
    versions = {
        row.pk: row
        for row in AdapterVersion.objects.visible_to(user)
        .select_related("run")
        .filter(base_model=version.base_model)
    }
    root = version
    while root.parent_id in versions:
        root = versions[root.parent_id]
    children: dict[int | None, list[AdapterVersion]] = {}
    for row in sorted(versions.values(), key=lambda row: row.pk):
        children.setdefault(row.parent_id, []).append(row)
    nodes: list[LineageNode] = []
    stack = [(root, 0)]
    while stack and len(nodes) < MAX_LINEAGE_NODES:
        row, depth = stack.pop()
        nodes.append(LineageNode(row, depth, row.pk == version.pk))
        stack += [(child, depth + 1) for child in reversed(children.get(row.pk, []))]
    return nodes


def get_disk_usage(user: User) -> dict[str, Any]:
    """Bytes of what somebody may see: adapters with their merged models, the newest runs' folders,
    and each owner's sums.
    """
    versions = AdapterVersion.objects.visible_to(user)
    merged: dict[int, int] = {}
    for subject in find_job_subjects(versions):
        size = subject.job.result.get("bytes", 0)
        merged[subject.object_id] = merged.get(subject.object_id, 0) + size
    adapters: dict[tuple[str, str], dict[str, Any]] = {}
    for pk, owner, name, size in versions.values_list(
        "pk", "owner__username", "name", "size_bytes"
    ):
        row = adapters.setdefault(
            (owner, name), {"owner": owner, "name": name, "versions": 0, "bytes": 0, "merged": 0}
        )
        row["versions"] += 1
        row["bytes"] += size
        row["merged"] += merged.get(pk, 0)
    newest = Run.objects.visible_to(user).select_related("owner").order_by("-pk")[:MAX_RUNS]
    runs = [
        {
            "id": run.pk,
            "name": run.name,
            "owner": run.owner.username,
            "bytes": measure_folder(run.folder),
        }
        for run in newest
    ]
    owners: dict[str, dict[str, Any]] = {}
    for kind, rows in (("bytes", adapters.values()), ("runs", runs)):
        for row in rows:
            total = owners.setdefault(row["owner"], {"owner": row["owner"], "bytes": 0, "runs": 0})
            total[kind] += row["bytes"] + row.get("merged", 0)
    largest = sorted(runs, key=lambda row: -row["bytes"])[:MAX_ROWS]
    return {
        "adapters": sorted(adapters.values(), key=lambda row: -row["bytes"] - row["merged"])[
            :MAX_ROWS
        ],
        "runs": largest,
        "owners": sorted(owners.values(), key=lambda row: -row["bytes"] - row["runs"]),
        "runs_measured": len(runs),
    }


def measure_folder(folder: Path) -> int:
    """Of a folder that an engine may be writing to: what goes away meanwhile counts nothing."""
    total = 0
    # A folder that goes away while it is walked through ends the walk
    with suppress(FileNotFoundError):
        for path in folder.rglob("*"):
            with suppress(FileNotFoundError):
                if path.is_file() and not path.is_symlink():
                    total += path.stat().st_size
    return total
