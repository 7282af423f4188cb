"""Comparisons in the API: sets of prompts, asking versions, their replies and scores, the verdict,
weights and votes.
"""

from datetime import datetime
from typing import Any, Literal

from django.http import QueryDict
from ninja import Query, Router, Schema
from ninja.pagination import paginate
from pydantic import ConfigDict, Field

from adapters.evaluation import prompt_sets, votes, weight_analysis
from adapters.evaluation import replies as evaluation_replies
from adapters.evaluation.figures import FIGURES, figures_of, settings_of, side_of
from adapters.evaluation.significance import verdicts
from adapters.evaluation.views import View, replies_of, view_of
from adapters.models import AdapterVersion, PromptSet, Reply
from training.datasets.visible import visible_data
from training.errors import NotFound, UserError
from training.people.paging import Paged
from training.people.requests import SignedIn
from training.people.visible import get_changeable, get_visible
from training.runs.metrics import comparison

router = Router(tags=["comparisons"])


class PromptsIn(Schema):
    model_config = ConfigDict(extra="forbid")
    data: int | None = Field(None, description="Draw held-out rows of this version of data.")
    count: int = Field(40, ge=1, le=prompt_sets.MOST_ROWS)
    text: str = Field(
        "",
        description="Or one prompt a line: text, or JSON with `prompt` or `messages`, and "
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


class AskIn(Schema):
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


def seen(request: SignedIn, versions: list[int], asked: int | None) -> View:
    given = QueryDict(mutable=True)
    given.setlist("v", [str(pk) for pk in versions])
    given["prompts"] = str(asked or "")
    return view_of(request, given)


@router.get("/prompts", response=list[PromptsOut])
@paginate(Paged)
def list_prompts(request: SignedIn) -> Any:
    return PromptSet.objects.visible_to(request.user)


@router.post("/prompts", response={201: PromptsOut})
def create_prompts(request: SignedIn, body: PromptsIn) -> Any:
    """A set of prompts, drawn from data that nobody trained on, or pasted."""
    if body.text.strip():
        return 201, prompt_sets.paste_prompts(request.user, body.text, body.name)
    if body.data is None:
        raise UserError("Give `data` to draw from, or `text`.", field="data")
    data = visible_data(request.user, body.data)
    if data is None:
        raise NotFound("There is no such data that you may see.", field="data")
    return 201, prompt_sets.draw_prompts(request.user, data, body.count)


@router.delete("/prompts/{int:prompts_id}", response={204: None})
def delete_prompts(request: SignedIn, prompts_id: int) -> Any:
    """Delete a set of prompts with the replies and votes on it."""
    prompt_sets.delete_prompts(request.user, get_changeable(PromptSet, request.user, prompts_id))
    return 204, None


@router.get("/prompts/{int:prompts_id}/replies", response=list[ReplyOut])
@paginate(Paged)
def list_replies(request: SignedIn, prompts_id: int) -> Any:
    """What has been said to a set by the versions that one may see, and by bases."""
    asked = get_visible(PromptSet, request.user, prompts_id)
    mine = AdapterVersion.objects.visible_to(request.user).values("pk")
    rows = Reply.objects.filter(prompts=asked)
    return (rows.filter(version=None) | rows.filter(version__in=mine)).order_by("row", "pk")


@router.post("/ask", response={202: dict[str, Any]})
def ask(request: SignedIn, body: AskIn) -> Any:
    """Ask versions and their bases a set of prompts; what has been answered is not asked again."""
    view = seen(request, body.versions, body.prompts)
    if view.prompts is None:
        raise UserError("Give the number of a set of prompts.", field="prompts")
    jobs = [evaluation_replies.ask(request.user, view.prompts, column) for column in view.columns]
    return 202, {"columns": [{"name": job.key, "stage": job.state} for job in jobs]}


@router.get("", response=dict[str, Any])
def read_comparison(request: SignedIn, v: Query[list[int]], prompts: int | None = None) -> Any:
    """Figures, differing settings and the verdict of two to six versions: `?v=1&v=2&prompts=3`."""
    view = seen(request, v, prompts)
    replies = replies_of(view)
    of_each = [list(replies[f"v{version.pk}"].values()) for version in view.versions]
    sides = [side_of(version, said) for version, said in zip(view.versions, of_each, strict=True)]
    figures = comparison.figures(
        [figures_of(one, said) for one, said in zip(view.versions, of_each, strict=True)], FIGURES
    )
    return {
        "versions": [{"id": one.pk, "name": str(one)} for one in view.versions],
        "figures": {figure.name: [value for value, _ in cells] for figure, cells in figures},
        "differences": {
            name: values
            for name, values, differs in comparison.differences(
                [settings_of(one) for one in view.versions]
            )
            if differs
        },
        "verdicts": [
            {"words": one.words, "sure": one.sure, "winner": one.winner} for one in verdicts(sides)
        ],
    }


@router.get("/weights", response=dict[str, Any])
def read_weights(request: SignedIn, v: Query[list[int]]) -> Any:
    """How far versions moved their base, and how alike they are; begun when it is first asked for,
    so ask again until `done`.
    """
    task = weight_analysis.begin(request.user, seen(request, v, None).versions)
    return {
        "stage": task.state,
        "words": task.progress_message,
        "error": task.error,
        "result": task.result,
    }


@router.post("/votes", response={201: dict[str, Any]})
def cast_vote(request: SignedIn, body: VoteIn) -> Any:
    """A blind choice between the two replies of a row; `left` and `right` are as the vote page
    shows them to this person.
    """
    asked = get_visible(PromptSet, request.user, body.prompts)
    first, second = (
        get_visible(AdapterVersion, request.user, pk) for pk in (body.first, body.second)
    )
    if first.pk == second.pk:
        raise UserError("Choose two versions to vote on.", field="second")
    made = votes.vote(request.user, asked, votes.ordered(first, second), body.row, body.choice)
    return 201, {"row": made.row}
