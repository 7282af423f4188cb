"""Versions side by side: one page whose address holds the whole view, the answers that stream into
it, and blind votes.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import Any

from django.db.models import Q
from django.http import HttpResponse, JsonResponse, QueryDict
from django.shortcuts import redirect, render
from django.urls import reverse
from django.views.decorators.http import require_POST

from adapters.evaluation import answer_table, prompt_sets, votes, weight_analysis
from adapters.evaluation import replies as evaluation_replies
from adapters.evaluation.figures import FIGURES, figures_of, settings_of, side_of
from adapters.evaluation.replies import Column
from adapters.evaluation.scores import METRICS
from adapters.evaluation.significance import verdicts
from adapters.models import AdapterVersion, PromptSet, Reply
from training.datasets.visible import visible_data
from training.engine.metrics import metrics_as_dicts
from training.errors import NotFound, UserError
from training.jobs.models import Job, JobState
from training.people.requests import SignedIn, number
from training.people.visible import get_changeable, get_visible
from training.runs.metrics import comparison
from training.runs.models import Run

FEWEST, MOST = 2, 6
DRAWN = 40
MOST_SETS = 100


@dataclass(frozen=True)
class View:
    """What the address says: versions in order, the prompts they are asked, how lines are ordered,
    and the page of them.
    """

    versions: list[AdapterVersion]
    prompts: PromptSet | None
    order: str
    page: int

    @property
    def columns(self) -> list[Column]:
        """Every base once, then the versions."""
        bases = {version.base_model_id: version.base_model for version in self.versions}
        return [
            *(Column(base) for base in bases.values()),
            *(Column(one.base_model, one) for one in self.versions),
        ]

    @property
    def pairs(self) -> list[tuple[AdapterVersion, AdapterVersion]]:
        return list(combinations(self.versions, 2))

    def address(self, **changed: Any) -> str:
        query = QueryDict(mutable=True)
        query.setlist("v", [str(version.pk) for version in self.versions])
        kept = {
            "prompts": self.prompts.pk if self.prompts else None,
            "order": self.order,
            "page": self.page,
            **changed,
        }
        for name, value in kept.items():
            if value and (name, value) not in (("order", "row"), ("page", 1)):
                query[name] = str(value)
        return f"{reverse('adapters-compare')}?{query.urlencode()}"


def view_of(request: SignedIn, given: QueryDict) -> View:
    """Raises UserError: too few or too many versions. NotFound: one that they may not see."""
    wanted = list(dict.fromkeys(number(text) for text in given.getlist("v")))
    if not FEWEST <= len(wanted) <= MOST:
        raise UserError(
            f"Choose {FEWEST} to {MOST} versions to compare; {len(wanted)} are chosen.", field="v"
        )
    rows = (
        AdapterVersion.objects.visible_to(request.user)
        .select_related("base_model", "run", "data__dataset")
        .in_bulk(wanted)
    )
    if len(rows) < len(wanted):
        raise NotFound("One of these versions is not there, or not for you to see.")
    chosen = number(given.get("prompts", ""))
    asked = get_visible(PromptSet, request.user, chosen) if chosen else None
    return View(
        [rows[pk] for pk in wanted],
        asked,
        given.get("order", "row"),
        max(1, number(given.get("page", "1"))),
    )


def side_by_side(request: SignedIn) -> HttpResponse:
    view = view_of(request, request.GET)
    replies = replies_of(view)
    mine = {
        run.pk
        for run in Run.objects.visible_to(request.user).filter(
            pk__in=[version.run_id for version in view.versions]
        )
    }
    curves = {
        version.run_id: {"id": version.run_id, "name": str(version), "place": place}
        for place, version in enumerate(view.versions)
    }
    values = {
        "view": view,
        "chosen": [curves[pk] for pk in curves if pk in mine],
        "settings": comparison.differences([settings_of(version) for version in view.versions]),
        "figures": comparison.figures(
            [figures_of(one, list(replies[f"v{one.pk}"].values())) for one in view.versions],
            FIGURES,
        ),
        "chart_metrics": metrics_as_dicts(),
        "sets": PromptSet.objects.visible_to(request.user)[:MOST_SETS],
        "datas": {
            version.data.pk: version.data for version in view.versions if version.data
        }.values(),
        "drawn": DRAWN,
        "mine": PromptSet.objects.changeable_by(request.user)
        .filter(pk=view.prompts.pk if view.prompts else None)
        .exists(),
        "rates": votes.rates(view.pairs),
        **grid_values(view, replies),
    }
    return render(request, "adapters/compare.html", values)


def answer_grid(request: SignedIn) -> HttpResponse:
    """The grid and the verdict anew, while replies come in."""
    view = view_of(request, request.GET)
    return render(request, "adapters/_answers.html", grid_values(view, replies_of(view)))


def replies_of(view: View) -> dict[str, dict[int, Reply]]:
    """Each column's replies by row."""
    found: dict[str, dict[int, Reply]] = {column.key: {} for column in view.columns}
    if view.prompts is not None:
        wanted = Q(version__in=view.versions) | Q(
            version=None, base_model__in=[one.base_model_id for one in view.versions]
        )
        for reply in Reply.objects.filter(wanted, prompts=view.prompts):
            key = f"v{reply.version_id}" if reply.version_id else f"b{reply.base_model_id}"
            found[key][reply.row] = reply
    return found


def grid_values(view: View, replies: dict[str, dict[int, Reply]]) -> dict[str, Any]:
    if view.prompts is None:
        return {"view": view}
    columns = view.columns
    tasks = {
        job.key: job
        for job in Job.objects.filter(
            kind=evaluation_replies.KIND, key__startswith=f"{view.prompts.pk}:"
        )
    }
    said = [replies[column.key] for column in columns]
    lines = answer_table.lines_of(view.prompts.rows, said, view.order, page=view.page)
    states = [tasks.get(f"{view.prompts.pk}:{column.key}") for column in columns]
    heads = [
        {
            "column": column,
            "task": task,
            "pending": task is not None and task.is_open,
            "address": view.address(order=f"worst-{place}", page=1),
        }
        for place, (column, task) in enumerate(zip(columns, states, strict=True))
    ]
    return {
        "view": view,
        "heads": heads,
        "lines": lines,
        "metrics": METRICS,
        "pages": [
            (page, view.address(page=page))
            for page in range(1, -(-len(view.prompts.rows) // answer_table.ROWS_A_PAGE) + 1)
        ],
        "query": view.address().partition("?")[2],
        "pending": any(head["pending"] for head in heads),
        "missing": any(task is None or task.state == JobState.FAILED for task in states),
        "by_row": view.address(order="row", page=1),
        "by_disagreement": view.address(order="disagreement", page=1),
        "verdicts": verdicts(
            [
                side_of(version, list(replies[f"v{version.pk}"].values()))
                for version in view.versions
            ]
        ),
    }


@require_POST
def ask(request: SignedIn) -> HttpResponse:
    """Ask every column a set of prompts: a known one, one drawn from data, or one that is
    pasted.
    """
    view = view_of(request, request.POST)
    chosen = view.prompts
    if request.POST.get("text", "").strip():
        chosen = prompt_sets.paste_prompts(
            request.user, request.POST["text"], request.POST.get("name", "")
        )
    elif chosen is None and request.POST.get("data"):
        data = visible_data(request.user, number(request.POST["data"]))
        if data is None:
            raise NotFound("There is no such data that you may see.")
        chosen = prompt_sets.draw_prompts(request.user, data, number(request.POST.get("count", "")))
    if chosen is None:
        raise UserError(
            "Choose a set of prompts, draw one from data, or paste some.", field="prompts"
        )
    # The base, which says most, last
    for column in sorted(view.columns, key=lambda column: column.version is None):
        evaluation_replies.ask(request.user, chosen, column)
    return redirect(f"{view.address(prompts=chosen.pk, page=1)}#answers")


@require_POST
def forget(request: SignedIn, prompts_id: int) -> HttpResponse:
    """Delete a set of prompts, and go on with the same versions."""
    gone = get_changeable(PromptSet, request.user, prompts_id)
    view = view_of(request, request.POST)
    prompt_sets.delete_prompts(request.user, gone)
    return redirect(view.address(prompts=None, page=1))


@require_POST
def weights(request: SignedIn) -> JsonResponse:
    """How far the versions moved their base, and how alike they are: begun by the first who looks,
    then kept.
    """
    view = view_of(request, request.POST)
    task = weight_analysis.begin(
        request.user, view.versions, again=request.POST.get("again") == "1"
    )
    told = {
        "stage": task.state,
        "words": task.progress_message,
        "error": task.error,
        "result": task.result,
    }
    return JsonResponse(
        {**told, "versions": [{"id": str(one.pk), "name": str(one)} for one in view.versions]}
    )


def pair_of(
    request: SignedIn, given: QueryDict
) -> tuple[PromptSet, AdapterVersion, AdapterVersion]:
    """Raises NotFound: something that they may not see. UserError: the two are the same."""
    asked = get_visible(PromptSet, request.user, number(given.get("prompts", "")))
    first, second = (
        get_visible(AdapterVersion, request.user, number(given.get(name, "")))
        for name in ("first", "second")
    )
    if first.pk == second.pk:
        raise UserError("Choose two versions to vote on.", field="second")
    return (asked, *votes.ordered(first, second))


def ballot(request: SignedIn) -> HttpResponse:
    """The next row to vote on. Which side is whose is nowhere in the page."""
    asked, first, second = pair_of(request, request.GET)
    values = {
        "prompts": asked,
        "first": first,
        "second": second,
        **ballot_values(request, asked, first, second),
    }
    return render(request, "adapters/vote.html", values)


def ballot_values(
    request: SignedIn, asked: PromptSet, first: AdapterVersion, second: AdapterVersion
) -> dict[str, Any]:
    found = votes.next_ballot(request.user, asked, first, second)
    row = asked.rows[found.row] if found else None
    voted = votes.voted(request.user, asked, first, second)
    # The rate is told only at the end, or it would sway who still votes.
    return {
        "ballot": found,
        "row": row,
        "voted": voted,
        "rate": None if found else votes.rate(first, second, asked),
    }


@require_POST
def vote(request: SignedIn) -> HttpResponse:
    asked, first, second = pair_of(request, request.POST)
    votes.vote(
        request.user,
        asked,
        (first, second),
        number(request.POST.get("row", "")),
        request.POST.get("choice", ""),
    )
    query = f"prompts={asked.pk}&first={first.pk}&second={second.pk}"
    return redirect(f"{reverse('adapters-vote')}?{query}")
