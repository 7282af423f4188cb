"""Actions on adapter versions: tag, annotate, delete, show lineage and disk usage."""

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
from training.text_input import check_text

MAX_LINEAGE_NODES = 60
MAX_RUNS, MAX_ROWS = 500, 100
SUGGESTED_TAGS = ("candidate", "production")


def update_version(
    user: User, version: AdapterVersion, *, tags: str | None = None, notes: str | None = None
) -> AdapterVersion:
    """Set the tags (comma-separated) or the notes of a version; None leaves them unchanged.

    Raises:
        NotAllowed: the user may not change this version.
        UserError: too many tags, an invalid tag, or notes that are too long.
    """
    check_changeable(user, version)
    if tags is not None:
        version.tags = normalize_tags(tags.split(","))
    if notes is not None:
        if len(notes) > MAX_NOTES_LENGTH:
            raise UserError(
                f"Notes can have at most {MAX_NOTES_LENGTH:,} characters.", field="notes"
            )
        check_text(notes, "notes")
        version.notes = notes
    version.save(update_fields=["tags", "notes"])
    return version


def delete_version(user: User, version: AdapterVersion, name: str) -> int:
    """Delete a version with its files, merged model, exports and evaluation results. Returns the
    bytes freed.

    Raises:
        UserError: `name` is not the version's name.
        Conflict: a deployment uses it, or an unfinished run starts from it.
    """
    check_changeable(user, version)
    check_name_typed(name, str(version))
    open_run = Run.objects.filter(start_version=version.pk, state__in=UNFINISHED).first()
    if open_run is not None:
        raise Conflict(
            f"Run {open_run.pk} ({open_run.name}) starts from {version}. Wait for it to finish or "
            "stop it first."
        )
    folders = [version.folder]
    for job in find_jobs_about(version):
        folders += list_job_folders(job)
    try:
        with transaction.atomic():
            version.delete()  # deletes its jobs, too
    except ProtectedError as error:
        names = ", ".join(row.name for row in find_deployments(version))
        raise Conflict(
            f"{version} is deployed as {names}. Switch or delete the deployment first."
        ) from error
    return sum(remove_tree(folder) for folder in dict.fromkeys(folders))


def find_deployments(version: AdapterVersion) -> list[Deployment]:
    return list(Deployment.objects.filter(Q(version=version) | Q(canary=version)))


@dataclass(frozen=True)
class LineageNode:
    """A version in the lineage tree, with its depth and whether it is the current one."""

    version: AdapterVersion
    depth: int
    is_current: bool

    @property
    def indent_levels(self) -> range:
        """A range for the template to indent by."""
        return range(self.depth - 1)


def build_lineage(user: User, version: AdapterVersion) -> list[LineageNode]:
    """The lineage tree that contains `version`, parents before children, without versions that the
    user may not see.
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
    """Bytes used by what the user may see: adapters with merged models, the newest runs, and totals
    by owner.
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
    """Bytes of a folder that an engine may be writing to. Files that vanish meanwhile count as
    zero.
    """
    total = 0
    # rglob raises FileNotFoundError if a subfolder vanishes during the walk
    with suppress(FileNotFoundError):
        for path in folder.rglob("*"):
            with suppress(FileNotFoundError):
                if path.is_file() and not path.is_symlink():
                    total += path.stat().st_size
    return total
