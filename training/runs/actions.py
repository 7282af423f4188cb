"""Actions on existing runs: rename, tag, annotate, archive, stop, resume, delete."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable

from django.db import transaction
from django.db.models import F
from django.utils import timezone

from training.engine.files import remove_tree
from training.engine.outcome import RESULT_FILE
from training.engine.stop_requests import STOP_FILE
from training.errors import Conflict, UserError, check_name_typed, to_one_line
from training.gpus import allocations
from training.people.disk_quota import check_disk_quota
from training.people.models import User
from training.people.permissions import check_changeable
from training.runs.forecast.summary import count_disk_bytes
from training.runs.models import MAX_NAME_LENGTH, MAX_NOTES_LENGTH, MAX_TAGS, Run, Sweep
from training.runs.notifications import notify_run_ended
from training.runs.queue import checks
from training.runs.run_files import list_checkpoint_steps
from training.runs.signals import run_changed, run_queued
from training.runs.states import ACTIVE, UNFINISHED, RequestedAction, State, get_source_states
from training.text_input import check_text

TAG = re.compile(r"[\w .:/-]{1,30}")


def update_run(
    user: User,
    run: Run,
    *,
    name: str | None = None,
    tags: str | None = None,
    notes: str | None = None,
) -> Run:
    """Change a run's name, tags or notes; None leaves a field unchanged. Tags are separated by
    commas.

    Raises:
        NotAllowed: the user may not change this run.
        UserError: the name is empty, there are too many tags, or a tag has invalid characters.
    """
    check_changeable(user, run)
    if name is not None:
        if not to_one_line(name):
            raise UserError("A run needs a name.", field="name")
        run.name = to_one_line(name)[:MAX_NAME_LENGTH]
    if tags is not None:
        run.tags = normalize_tags(tags.split(","))
    if notes is not None:
        if len(notes) > MAX_NOTES_LENGTH:
            raise UserError(f"Notes have at most {MAX_NOTES_LENGTH:,} characters.", field="notes")
        check_text(notes, "notes")
        run.notes = notes
    run.save(update_fields=["name", "tags", "notes"])
    return run


def normalize_tags(tags: Iterable[str]) -> str:
    normalized = list(dict.fromkeys(to_one_line(tag) for tag in tags if to_one_line(tag)))
    if len(normalized) > MAX_TAGS:
        raise UserError(f"A run has at most {MAX_TAGS} tags.", field="tags")
    for tag in normalized:
        if not TAG.fullmatch(tag):
            raise UserError(
                f"The tag {tag[:40]!r} is invalid: use at most 30 letters, digits, spaces or _.:/-",
                field="tags",
            )
    return f",{','.join(normalized)}," if normalized else ""


def archive_run(user: User, run: Run, *, restore: bool = False) -> None:
    """Hide a run from the list, or show it again. Nothing is deleted.

    Raises:
        Conflict: the run is still active.
    """
    check_changeable(user, run)
    if run.state in UNFINISHED and not restore:
        raise Conflict(f"{run.name} is still active. Stop it first.")
    run.archived_at = None if restore else timezone.now()
    run.save(update_fields=["archived_at"])


def delete_run(user: User, run: Run, name: str) -> int:
    """Delete a run with its curves, checkpoints and files; returns the number of bytes freed.
    Registered adapters are kept.

    Raises:
        UserError: `name` is not the run's name.
        Conflict: the run is still active.
    """
    check_changeable(user, run)
    check_name_typed(name, run.name)
    with transaction.atomic():
        if (
            not Run.objects.select_for_update()
            .filter(pk=run.pk)
            .exclude(state__in=UNFINISHED)
            .exists()
        ):
            raise Conflict(f"{run.name} is still active. Stop it first.")
        folder = run.folder
        Run.objects.filter(pk=run.pk).delete()
    return remove_tree(folder)


def stop_run(run: Run, *, discard: bool) -> Run:
    """Stop a run and save its adapter, or discard it. A queued run ends at once, an active one
    after its current step.

    Raises:
        Conflict: the run has already ended.
    """
    requested_action = RequestedAction.DISCARD if discard else RequestedAction.STOP
    changes = {"requested_action": requested_action, "revision": F("revision") + 1}
    if Run.objects.filter(pk=run.pk, state__in=ACTIVE).update(**changes):
        Run.objects.filter(pk=run.pk, state__in=(State.STARTING, State.RUNNING)).update(
            state=State.STOPPING
        )
    elif not cancel_queued_run(run, discard=discard):
        run.refresh_from_db()
        raise Conflict(f"{run.name} has already ended ({run.get_state_display().lower()}).")
    run_changed.send(Run, run_id=run.pk)
    run.refresh_from_db()
    return run


def stop_sweep(sweep: Sweep) -> None:
    """Stop every unfinished run of a sweep and save their adapters."""
    for run in sweep.runs.filter(state__in=UNFINISHED):
        try:
            stop_run(run, discard=False)
        except Conflict:
            continue  # it has just ended on its own


def cancel_queued_run(run: Run, *, discard: bool) -> bool:
    """End a run that has no engine; returns whether it did. A worker may claim the run at the same
    time, so the UPDATE checks its state.
    """
    if discard or not (list_checkpoint_steps(run) or (run.folder / "trials").exists()):
        state, message = State.CANCELLED, "Canceled while queued."
    else:
        state, message = (
            State.STOPPED,
            f"Stopped while queued, after step {run.step}. The checkpoint is kept.",
        )
    with transaction.atomic():
        cancelled = Run.objects.filter(pk=run.pk, state=State.QUEUED).update(
            state=state, message=message, finished_at=timezone.now(), revision=F("revision") + 1
        )
        if cancelled:
            # The run may have a device that no worker has claimed yet.
            allocations.release_device(run.pk)
            notify_run_ended(run.pk)
    if cancelled and state == State.CANCELLED:
        shutil.rmtree(run.folder / "checkpoints", ignore_errors=True)
    if cancelled:  # and not continued meanwhile
        Run.objects.filter(pk=run.pk, state=state).update(disk_bytes=run.measure_disk_bytes())
    return bool(cancelled)


def reserve_disk(run: Run) -> None:
    """Reserve what a run may write when it continues. Raises Conflict: a disk quota would be
    exceeded.
    """
    trainable = run.start_info.get("trainable_parameters") or run.forecast.get("trainable") or 0
    disk_bytes = max(run.disk_bytes, count_disk_bytes(int(trainable)))
    check_disk_quota(run.owner, run.team, disk_bytes - run.disk_bytes)
    Run.objects.filter(pk=run.pk).update(disk_bytes=disk_bytes)


def continue_run(user: User, run: Run) -> Run:
    """Queue a stopped or failed run again. It resumes from its last checkpoint, or starts over if
    there is none.

    Raises:
        NotAllowed: the run has used up its device time; only an admin may resume it.
        Conflict: the owner's limit of queued runs is reached, or a disk quota would be exceeded.
        Conflict: the run is in a state that cannot be resumed.
    """
    checks.check_time_limit(user, run)
    with transaction.atomic():  # no worker may claim it before the old result is deleted
        checks.check_queue_limit(run.owner)
        reserve_disk(run)
        updated = Run.objects.filter(
            pk=run.pk, state__in=set(get_source_states(State.QUEUED)) - set(ACTIVE)
        ).update(
            state=State.QUEUED,
            requested_action=RequestedAction.RUN,
            message="",
            failure="",
            crash_count=0,
            not_before=None,
            finished_at=None,
            queued_at=timezone.now(),
            revision=F("revision") + 1,
        )
        if not updated:
            raise Conflict(
                f"{run.name} is {run.get_state_display().lower()} and cannot be resumed."
            )
        for name in (STOP_FILE, RESULT_FILE):
            (run.folder / name).unlink(missing_ok=True)
        shutil.rmtree(run.folder / "adapter", ignore_errors=True)
        transaction.on_commit(lambda: run_queued.send(Run, run_id=run.pk))
    run.refresh_from_db()
    return run
