"""API endpoints of the queue: list waiting runs, move a run up, change its priority or pool, and
dry-run a quota edit.
"""

from typing import Annotated, Any

from ninja import Router, Schema
from ninja.pagination import paginate
from pydantic import ConfigDict, Field

from training.gpus import quotas
from training.gpus.schemas import QuotaIn
from training.people.pagination import Pagination
from training.people.permissions import check_admin, get_changeable
from training.people.requests import AuthenticatedRequest
from training.people.teams import get_team
from training.runs import filters
from training.runs.models import Run
from training.runs.queue import actions, what_if
from training.runs.schemas import RunOut
from training.runs.states import Priority, State
from training.runs.status import format_queue_status

router = Router(tags=["gpus"])
RELATED = (*filters.RELATED, "team")


class QueuedRunOut(Schema):
    id: int
    name: str
    owner: str
    team: str | None
    pool: str | None
    priority: Priority
    position: int | None
    reason: str
    hint: str
    earliest: float | None = Field(description="seconds since 1970")
    latest: float | None = Field(description="null if a run ahead has no expected end")

    @staticmethod
    def resolve_owner(row: Run) -> str:
        return str(row.owner.username)

    @staticmethod
    def resolve_team(row: Run) -> str | None:
        return row.team.name if row.team else None

    @staticmethod
    def resolve_pool(row: Run) -> str | None:
        return row.pool.name if row.pool else None

    @staticmethod
    def resolve_position(row: Run) -> int | None:
        return row.queue_info.get("position")

    @staticmethod
    def resolve_reason(row: Run) -> str:
        return (
            format_queue_status(row)
            if "device" in row.queue_info
            else str(row.queue_info.get("reason", ""))
        )

    @staticmethod
    def resolve_hint(row: Run) -> str:
        return str(row.queue_info.get("hint", ""))

    @staticmethod
    def resolve_earliest(row: Run) -> float | None:
        return row.queue_info.get("earliest")

    @staticmethod
    def resolve_latest(row: Run) -> float | None:
        return row.queue_info.get("latest")


class PriorityIn(Schema):
    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"priority": "background"}]}
    )
    priority: Priority
    reason: str = Field("", max_length=300)


class PoolIn(Schema):
    model_config = ConfigDict(extra="forbid")
    pool: Annotated[int, Field(ge=0, le=2**53)]


class StartShiftOut(Schema):
    run: int
    name: str
    seconds_before: float | None
    seconds_after: float | None


@router.get("/queue", response=list[QueuedRunOut])
@paginate(Pagination)
def read_queue(request: AuthenticatedRequest) -> Any:
    """Queued runs that you may see, oldest first, each with its position, the reason why it waits
    and its estimated start.
    """
    waiting = Run.objects.visible_to(request.user).filter(state=State.QUEUED).order_by("queued_at")
    return waiting.select_related("owner", "team", "pool").defer(
        "config", "start_info", "auto_plan"
    )


@router.post("/queue/dry-run/{int:pool_id}", response=list[StartShiftOut])
def dry_run_quota(
    request: AuthenticatedRequest, pool_id: int, body: QuotaIn
) -> list[dict[str, Any]]:
    """Which waiting runs would start earlier or later with this quota. Nothing is saved. Admins
    only.
    """
    check_admin(request.user, quotas.EDIT_QUOTAS)
    pool = quotas.get_pool(pool_id)
    team = get_team(request.user, body.team) if body.team is not None else None
    edited_quota = quotas.apply_quota_changes(
        pool, team, body.dict(exclude={"team", "reason"}, exclude_unset=True)
    )
    return [
        {
            "run": row.run.pk,
            "name": row.run.name,
            "seconds_before": row.seconds_before,
            "seconds_after": row.seconds_after,
        }
        for row in what_if.simulate_quota_edit(edited_quota)
    ]


@router.post("/{int:run_id}/up", response=RunOut)
def move_up(request: AuthenticatedRequest, run_id: int) -> Run:
    """Move a run to the front of its owner's waiting runs."""
    run = get_changeable(Run, request.user, run_id, *RELATED)
    actions.move_up(run)
    return run


@router.post("/{int:run_id}/priority", response=RunOut)
def change_priority(request: AuthenticatedRequest, run_id: int, body: PriorityIn) -> Run:
    """Change the priority. `background` runs are preempted by all others, and only admins grant
    `urgent`.
    """
    run = get_changeable(Run, request.user, run_id, *RELATED)
    actions.change_priority(request.user, run, body.priority, body.reason)
    run.refresh_from_db()
    return run


@router.post("/{int:run_id}/pool", response=RunOut)
def change_pool(request: AuthenticatedRequest, run_id: int, body: PoolIn) -> Run:
    """Move a waiting run to another pool."""
    run = get_changeable(Run, request.user, run_id, *RELATED)
    actions.change_pool(request.user, run, quotas.get_pool(body.pool))
    run.refresh_from_db()
    return run
