"""What people do to runs that are there: rename, tag, note, archive, delete."""

from __future__ import annotations

import re
from collections.abc import Iterable

from django.db import transaction
from django.utils import timezone

from training.engine.files import remove_tree
from training.errors import Conflict, UserError, one_line
from training.people.models import User
from training.people.visible import may_change
from training.runs.launch import MAX_NAME
from training.runs.models import Run
from training.runs.states import OPEN

MAX_TAGS = 10
MAX_NOTES = 10_000
TAG = re.compile(r"[\w .:/-]{1,30}")


def describe_run(user: User, run: Run, *, name: str | None = None, tags: str | None = None, notes: str | None = None) -> Run:
    """Rename a run, tag it, write notes to it; None leaves a part as it is. Tags come with commas.

    Raises:
        NotAllowed: not theirs to change.
        UserError: no name, too many tags, or a tag with odd characters.
    """
    may_change(user, run)
    if name is not None:
        if not one_line(name):
            raise UserError("A run needs a name.", field="name")
        run.name = one_line(name)[:MAX_NAME]
    if tags is not None:
        run.tags = packed_tags(tags.split(","))
    if notes is not None:
        if len(notes) > MAX_NOTES:
            raise UserError(f"Notes have at most {MAX_NOTES:,} characters.", field="notes")
        run.notes = notes.replace("\0", "")
    run.save(update_fields=["name", "tags", "notes"])
    return run


def packed_tags(tags: Iterable[str]) -> str:
    found = list(dict.fromkeys(one_line(tag) for tag in tags if one_line(tag)))
    if len(found) > MAX_TAGS:
        raise UserError(f"A run has at most {MAX_TAGS} tags.", field="tags")
    for tag in found:
        if not TAG.fullmatch(tag):
            raise UserError(f"The tag {tag[:40]!r} has odd characters or more than 30.", field="tags")
    return f",{','.join(found)}," if found else ""


def archive(user: User, run: Run, *, back: bool = False) -> None:
    """Take a run out of the list, or put it back; nothing of it is lost.

    Raises:
        Conflict: it is not over.
    """
    may_change(user, run)
    if run.state in OPEN and not back:
        raise Conflict(f"{run.name} is not over yet; stop it first.")
    run.archived_at = None if back else timezone.now()
    run.save(update_fields=["archived_at"])


def delete(user: User, run: Run, name: str) -> int:
    """Delete a run with its curves, checkpoints and files; returns the bytes freed. An adapter on the shelf stays.

    Raises:
        UserError: `name` is not its name.
        Conflict: it is not over.
    """
    may_change(user, run)
    if one_line(name) != run.name:
        raise UserError(f"Type the name, {run.name}, to delete it.", field="name")
    with transaction.atomic():
        if not Run.objects.select_for_update().filter(pk=run.pk).exclude(state__in=OPEN).exists():
            raise Conflict(f"{run.name} is not over yet; stop it first.")
        folder = run.folder
        Run.objects.filter(pk=run.pk).delete()
    return remove_tree(folder)
