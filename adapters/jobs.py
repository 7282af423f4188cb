"""What a worker works out of versions, a program at a time: merges, exports, comparisons. It knows
no torch and no kind.

A kind is a generator that yields what it has done so far and at last its `result`. Beginning again
must lead to the same end:
work whose worker has said nothing for LOST_SECONDS is begun again, MOST_TRIES times.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from django.conf import settings
from django.db import IntegrityError, OperationalError, connection
from django.db.models import F, QuerySet
from django.utils import timezone

from adapters.models import AdapterVersion, Stage, Work
from training.child_environment import child_environment, follow_child
from training.errors import UserError
from training.people.models import User
from training.runs.worker.ingest import clean

LOST_SECONDS = 30
BEAT_SECONDS = 5.0
MOST_TRIES = 3
Said = dict[str, Any]
Act = Callable[[Work], Generator[Said, None, None]]
KINDS: dict[str, Act] = {}  # filled by adapters/kinds.py
TALKS = ("answers",)


class Unwanted(Exception):
    """The row is gone or another worker's."""


def begin(
    user: User,
    kind: str,
    key: str,
    *,
    version: AdapterVersion | None = None,
    order: Said | None = None,
    again: bool = True,
) -> Work:
    """The work of this key: begun now, under way, or done before. What has failed is begun `again`,
    unless one only looks.
    """
    work, made = Work.objects.get_or_create(
        kind=kind, key=key, defaults={"version": version, "owner": user, "order": order or {}}
    )
    if again and not made and work.stage == Stage.FAILED:
        Work.objects.filter(pk=work.pk, stage=Stage.FAILED).update(
            stage=Stage.WAITING, error="", tries=0, words="", done=0, total=0, order=order or {}
        )
        work.refresh_from_db()
    return work


def do_next() -> None:
    """Do the program that waits longest, if there is any; a worker calls this over and over, in one
    thread.
    """
    do_longest_waiting(Work.objects.exclude(kind__in=TALKS))


def talk_next() -> None:
    """The same for what only asks the inference program: it need not wait for a merge."""
    do_longest_waiting(Work.objects.filter(kind__in=TALKS))


def do_longest_waiting(rows: QuerySet[Work]) -> None:
    lost = timezone.now() - timedelta(seconds=LOST_SECONDS)
    gone = rows.filter(stage=Stage.WORKING, worked_at__lt=lost)
    gone.filter(tries__gte=MOST_TRIES).update(
        stage=Stage.FAILED, error="It broke off three times; the worker's log has more."
    )
    gone.update(stage=Stage.WAITING)
    waiting = rows.filter(stage=Stage.WAITING).order_by("pk").first()
    if waiting is not None:
        do(waiting.pk)


def do(work_id: int) -> None:
    """Do one piece of work. A second call for the same one does nothing."""
    mine = Work.objects.filter(pk=work_id, stage=Stage.WAITING)
    if not mine.update(
        stage=Stage.WORKING, worked_at=timezone.now(), tries=F("tries") + 1, words="starting"
    ):
        return
    work = Work.objects.select_related("version__base_model", "owner").get(pk=work_id)
    ended = False
    try:
        with beating(work):
            for said in KINDS[work.kind](work):
                write(
                    work,
                    **{name: said[name] for name in ("words", "done", "total") if name in said},
                )
                if "result" in said:
                    write(work, stage=Stage.DONE, result=clean(said["result"]), words="")
        ended = True
    except Unwanted:
        ended = True
    except IntegrityError:  # a row of something that is deleted, and this work with it
        ended = not Work.objects.filter(pk=work.pk).exists()
        if not ended:
            raise
    except UserError as error:
        ended = fail(work, error.message)
    finally:
        if not ended:  # whatever it was goes on to the worker's log
            fail(work, "It broke off for a reason that nobody foresaw; the worker's log has it.")


def fail(work: Work, error: str) -> bool:
    mine = Work.objects.filter(pk=work.pk, stage=Stage.WORKING, tries=work.tries)
    mine.update(stage=Stage.FAILED, error=error, words="")
    return True


def write(work: Work, **changes: Any) -> None:
    """Raises Unwanted: the work was thrown away, or is another worker's by now."""
    if not Work.objects.filter(pk=work.pk, stage=Stage.WORKING, tries=work.tries).update(
        worked_at=timezone.now(), **changes
    ):
        raise Unwanted


@contextmanager
def beating(work: Work) -> Iterator[None]:
    """Say that it is alive every few seconds, however long a step takes."""
    over = threading.Event()

    def beat() -> None:
        while not over.wait(BEAT_SECONDS):
            with suppress(
                OperationalError
                # a database that is busy this time may not be the next; LOST_SECONDS has room for
                # five
            ):
                Work.objects.filter(pk=work.pk, stage=Stage.WORKING, tries=work.tries).update(
                    worked_at=timezone.now()
                )
        connection.close()

    thread = threading.Thread(target=beat, name=f"work-{work.pk}", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def follow(
    module: str, folder: Path, order: Said, environment: dict[str, str] | None = None
) -> Iterator[Said]:
    """What a program of ours says, a child with none of our secrets; its order lies in its folder.

    Raises:
        UserError: what the program said is wrong.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "order.json").write_text(json.dumps(order))
    command = [sys.executable, "-m", module, str(folder)]
    for said in follow_child(
        command,
        folder / "program.log",
        cwd=settings.BASE_DIR,
        environment=environment or child_environment(),
    ):
        if "error" in said:
            raise UserError(said["error"])
        yield said
