"""Actions on adapter versions: tag, annotate, delete, and show the lineage."""

from __future__ import annotations

from dataclasses import dataclass

from django.db import transaction
from django.db.models import ProtectedError, Q, QuerySet

from adapters.models import AdapterVersion, Deployment
from training.engine.files import remove_tree
from training.errors import Conflict, UserError, check_name_typed
from training.jobs.services import find_jobs_about, list_job_folders
from training.people.models import User
from training.people.permissions import check_changeable
from training.runs.actions import normalize_tags
from training.runs.models import MAX_NOTES_LENGTH, Run
from training.runs.states import UNFINISHED
from training.text_input import check_text

MAX_NAMED_DEPLOYMENTS = 5
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
        deployed = find_deployments(version)[:MAX_NAMED_DEPLOYMENTS]
        names = ", ".join(row.name for row in deployed)
        raise Conflict(
            f"{version} is deployed as {names}. Switch or delete the deployment first."
        ) from error
    return sum(remove_tree(folder) for folder in dict.fromkeys(folders))


def find_deployments(version: AdapterVersion) -> QuerySet[Deployment]:
    return Deployment.objects.filter(Q(version=version) | Q(canary=version))


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
        .filter(base_model=version.base_model)
        .defer("provenance", "files", "notes")
    }
    root = version
    while root.parent_id in versions:
        root = versions[root.parent_id]
    children: dict[int | None, list[AdapterVersion]] = {}
    for row in sorted(versions.values(), key=lambda row: row.pk):
        children.setdefault(row.parent_id, []).append(row)
    nodes: list[LineageNode] = []
    stack = [(root, 0)]
    while stack:
        row, depth = stack.pop()
        nodes.append(LineageNode(row, depth, row.pk == version.pk))
        stack += [(child, depth + 1) for child in reversed(children.get(row.pk, []))]
    return nodes
