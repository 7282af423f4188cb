"""API for comparisons: prompt sets, replies and scores, significance tests, weights and blind
votes.
"""

from datetime import datetime
from typing import Any, Literal

from django.http import QueryDict
from ninja import Query, Router, Schema
from ninja.pagination import paginate
from pydantic import ConfigDict, Field

from adapters.evaluation import prompt_sets, votes, weight_analysis
from adapters.evaluation import replies as evaluation_replies
from adapters.evaluation.figures import (
    FIGURES,
    build_contender,
    build_figures,
    get_comparison_settings,
)
from adapters.evaluation.significance import build_verdicts
from adapters.evaluation.views import ComparisonParams, get_replies, parse_params
from adapters.models import AdapterVersion, PromptSet, Reply
from training.datasets.permissions import get_visible_version
from training.errors import UserError
from training.people.pagination import Pagination
from training.people.permissions import get_changeable, get_visible
from training.people.requests import AuthenticatedRequest
from training.runs.metrics import comparison

router = Router(tags=["comparisons"])


class PromptsIn(Schema):
    model_config = ConfigDict(extra="forbid")
    data: int | None = Field(None, description="Draw held-out rows of this dataset version.")
    count: int = Field(40, ge=1, le=prompt_sets.MAX_ROWS)
    text: str = Field(
        "",
        description="Or one prompt per line: text, or JSON with `prompt` or `messages`, and "
        "`expected`.",
    )
    name: str = Field("", max_length=120)


class PromptsOut(Schema):
    id: int
    name: str
    rows: int
    created_at: datetime

    @staticmethod
    def resolve_rows(row: PromptSet) -> int:
        return len(row.rows)


class RequestRepliesIn(Schema):
    model_config = ConfigDict(extra="forbid")
    versions: list[int] = Field(min_length=2, max_length=6)
    prompts: int


class ReplyOut(Schema):
    row: int
    version: int | None
    base_model: int
    text: str
    scores: dict[str, float]
    tokens: int
    seconds: float

    @staticmethod
    def resolve_version(row: Reply) -> int | None:
        return row.version_id

    @staticmethod
    def resolve_base_model(row: Reply) -> int:
        return row.base_model_id


class VoteIn(Schema):
    model_config = ConfigDict(extra="forbid")
    prompts: int
    first: int
    second: int
    row: int = Field(ge=0, le=2**31)
    choice: Literal["left", "right", "tie"]


def build_params(
    request: AuthenticatedRequest, versions: list[int], prompts_id: int | None
) -> ComparisonParams:
    form = QueryDict(mutable=True)
    form.setlist("v", [str(pk) for pk in versions])
    form["prompts"] = str(prompts_id or "")
    return parse_params(request, form)


@router.get("/prompts", response=list[PromptsOut])
@paginate(Pagination)
def list_prompts(request: AuthenticatedRequest) -> Any:
    return PromptSet.objects.visible_to(request.user)


@router.post("/prompts", response={201: PromptsOut})
def create_prompts(request: AuthenticatedRequest, body: PromptsIn) -> Any:
    """Create a prompt set from held-out rows of a dataset version, or from pasted text."""
    if body.text.strip():
        return 201, prompt_sets.paste_prompts(request.user, body.text, body.name)
    if body.data is None:
        raise UserError("Set `data` or `text`.", field="data")
    data = get_visible_version(request.user, body.data)
    return 201, prompt_sets.draw_prompts(request.user, data, body.count)


@router.delete("/prompts/{int:prompts_id}", response={204: None})
def delete_prompts(request: AuthenticatedRequest, prompts_id: int) -> Any:
    """Delete a prompt set with its replies and votes."""
    prompt_sets.delete_prompts(request.user, get_changeable(PromptSet, request.user, prompts_id))
    return 204, None


@router.get("/prompts/{int:prompts_id}/replies", response=list[ReplyOut])
@paginate(Pagination)
def list_replies(request: AuthenticatedRequest, prompts_id: int) -> Any:
    """The replies of base models and of the versions visible to you."""
    prompts = get_visible(PromptSet, request.user, prompts_id)
    visible = AdapterVersion.objects.visible_to(request.user).values("pk")
    rows = Reply.objects.filter(prompts=prompts)
    return (rows.filter(version=None) | rows.filter(version__in=visible)).order_by("row", "pk")


@router.post("/replies", response={202: dict[str, Any]})
def request_replies(request: AuthenticatedRequest, body: RequestRepliesIn) -> Any:
    """Generate the replies of versions and their base models to a prompt set. Existing replies are
    kept.
    """
    params = build_params(request, body.versions, body.prompts)
    if params.prompts is None:
        raise UserError("Set `prompts` to the ID of a prompt set.", field="prompts")
    jobs = [
        evaluation_replies.request_replies(request.user, params.prompts, responder)
        for responder in params.columns
    ]
    return 202, {"columns": [{"name": job.key, "state": job.state} for job in jobs]}


@router.get("", response=dict[str, Any])
def read_comparison(
    request: AuthenticatedRequest, v: Query[list[int]], prompts: int | None = None
) -> Any:
    """Compare two to six versions: figures, settings that differ and significance tests. Query:
    `?v=1&v=2&prompts=3`.
    """
    params = build_params(request, v, prompts)
    replies = get_replies(params)
    version_replies = [list(replies[f"v{version.pk}"].values()) for version in params.versions]
    contenders = [
        build_contender(version, answers)
        for version, answers in zip(params.versions, version_replies, strict=True)
    ]
    figures = comparison.compare_figures(
        [
            build_figures(one, answers)
            for one, answers in zip(params.versions, version_replies, strict=True)
        ],
        FIGURES,
    )
    return {
        "versions": [{"id": one.pk, "name": str(one)} for one in params.versions],
        "figures": {figure.name: [value for value, _ in cells] for figure, cells in figures},
        "differences": {
            name: values
            for name, values, differs in comparison.compare_settings(
                [get_comparison_settings(one) for one in params.versions]
            )
            if differs
        },
        "verdicts": [
            {"message": one.message, "is_significant": one.is_significant, "winner": one.winner}
            for one in build_verdicts(contenders)
        ],
    }


@router.get("/weights", response=dict[str, Any])
def read_weights(request: AuthenticatedRequest, v: Query[list[int]]) -> Any:
    """How much each version changes its base model's weights, and how similar the versions are. The
    first request starts the analysis; repeat it until `state` is `done`.
    """
    job = weight_analysis.enqueue_analysis(request.user, build_params(request, v, None).versions)
    return {
        "state": job.state,
        "message": job.progress_message,
        "error": job.error,
        "result": job.result,
    }


@router.post("/votes", response={201: dict[str, Any]})
def cast_vote(request: AuthenticatedRequest, body: VoteIn) -> Any:
    """Vote blind on the two replies of a row. `left` and `right` are the sides shown to you on the
    vote page.
    """
    prompts = get_visible(PromptSet, request.user, body.prompts)
    first, second = (
        get_visible(AdapterVersion, request.user, pk) for pk in (body.first, body.second)
    )
    if first.pk == second.pk:
        raise UserError("Choose two different versions.", field="second")
    vote = votes.cast_vote(
        request.user, prompts, votes.order_pair(first, second), body.row, body.choice
    )
    return 201, {"row": vote.row}
