"""Pages that compare versions: the comparison, whose URL holds all its parameters, the answers that
are filled in as they arrive, and blind votes.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import Any

from django.db.models import Q
from django.http import HttpResponse, JsonResponse, QueryDict
from django.shortcuts import redirect, render
from django.urls import reverse
from django.views.decorators.http import require_POST, require_safe

from adapters.evaluation import answer_table, prompt_sets, votes, weight_analysis
from adapters.evaluation import replies as evaluation_replies
from adapters.evaluation.figures import (
    FIGURES,
    build_contender,
    build_figures,
    get_comparison_settings,
)
from adapters.evaluation.replies import Responder
from adapters.evaluation.scores import METRICS
from adapters.evaluation.significance import build_verdicts
from adapters.models import AdapterVersion, PromptSet, Reply
from adapters.option_sources import PROMPT_SETS
from training.datasets.permissions import get_visible_version
from training.engine.metrics import metrics_as_dicts
from training.errors import NotFound, UserError
from training.jobs.models import Job, JobState
from training.people.options import list_options
from training.people.permissions import get_changeable, get_visible
from training.people.requests import AuthenticatedRequest, parse_int_or_zero
from training.runs.metrics import comparison
from training.runs.models import Run

MIN_VERSIONS, MAX_VERSIONS = 2, 6
DEFAULT_PROMPTS = 40


@dataclass(frozen=True)
class ComparisonParams:
    """The parameters in the URL: the versions in order, the prompt set, the order of the rows and
    the page.
    """

    versions: list[AdapterVersion]
    prompts: PromptSet | None
    order: str
    page: int

    @property
    def columns(self) -> list[Responder]:
        """Each base model once, then the versions."""
        bases = {version.base_model_id: version.base_model for version in self.versions}
        return [
            *(Responder(base) for base in bases.values()),
            *(Responder(one.base_model, one) for one in self.versions),
        ]

    @property
    def pairs(self) -> list[tuple[AdapterVersion, AdapterVersion]]:
        return list(combinations(self.versions, 2))

    def build_url(self, page_name: str = "adapters-compare", **changes: Any) -> str:
        query = QueryDict(mutable=True)
        query.setlist("v", [str(version.pk) for version in self.versions])
        query_params = {
            "prompts": self.prompts.pk if self.prompts else None,
            "order": self.order,
            "page": self.page,
            **changes,
        }
        for name, value in query_params.items():
            if value and (name, value) not in (("order", "row"), ("page", 1)):
                query[name] = str(value)
        return f"{reverse(page_name)}?{query.urlencode()}"


def parse_params(request: AuthenticatedRequest, form: QueryDict) -> ComparisonParams:
    """Raises UserError for too few or too many versions, NotFound for one that the user may not
    see.
    """
    version_ids = list(dict.fromkeys(parse_int_or_zero(text) for text in form.getlist("v")))
    if not MIN_VERSIONS <= len(version_ids) <= MAX_VERSIONS:
        raise UserError(
            f"Choose {MIN_VERSIONS} to {MAX_VERSIONS} versions to compare; got {len(version_ids)}.",
            field="v",
        )
    rows = (
        AdapterVersion.objects.visible_to(request.user)
        .select_related("base_model", "run", "data__dataset")
        .in_bulk(version_ids)
    )
    if len(rows) < len(version_ids):
        raise NotFound("One of these versions was not found.")
    prompts_id = parse_int_or_zero(form.get("prompts", ""))
    prompts = get_visible(PromptSet, request.user, prompts_id) if prompts_id else None
    return ComparisonParams(
        [rows[pk] for pk in version_ids],
        prompts,
        form.get("order", "row"),
        max(1, parse_int_or_zero(form.get("page", "1"))),
    )


@require_safe
def compare_versions(request: AuthenticatedRequest) -> HttpResponse:
    params = parse_params(request, request.GET)
    replies = get_replies(params)
    visible_run_ids = {
        run.pk
        for run in Run.objects.visible_to(request.user).filter(
            pk__in=[version.run_id for version in params.versions]
        )
    }
    curves = {
        version.run_id: {"id": version.run_id, "name": str(version), "index": position}
        for position, version in enumerate(params.versions)
    }
    values = {
        "params": params,
        "chosen": [curves[pk] for pk in curves if pk in visible_run_ids],
        "settings": comparison.compare_settings(
            [get_comparison_settings(version) for version in params.versions]
        ),
        "figures": comparison.compare_figures(
            [build_figures(one, list(replies[f"v{one.pk}"].values())) for one in params.versions],
            FIGURES,
        ),
        "chart_metrics": metrics_as_dicts(),
        "sets": list_options(request.user, PROMPT_SETS),
        "datasets": {
            version.data.pk: version.data for version in params.versions if version.data
        }.values(),
        "default_count": DEFAULT_PROMPTS,
        "can_change": PromptSet.objects.changeable_by(request.user)
        .filter(pk=params.prompts.pk if params.prompts else None)
        .exists(),
        "rates": votes.get_win_rates(params.pairs),
        **get_answers_context(params, replies),
    }
    return render(request, "adapters/compare.html", values)


@require_safe
def show_answers(request: AuthenticatedRequest) -> HttpResponse:
    """The answers and verdicts, which the page reloads while replies arrive."""
    params = parse_params(request, request.GET)
    return render(
        request, "adapters/_answers.html", get_answers_context(params, get_replies(params))
    )


def get_replies(params: ComparisonParams) -> dict[str, dict[int, Reply]]:
    """The replies of each column by row."""
    replies_by_key: dict[str, dict[int, Reply]] = {column.key: {} for column in params.columns}
    if params.prompts is not None:
        condition = Q(version__in=params.versions) | Q(
            version=None, base_model__in=[one.base_model_id for one in params.versions]
        )
        for reply in Reply.objects.filter(condition, prompts=params.prompts):
            key = f"v{reply.version_id}" if reply.version_id else f"b{reply.base_model_id}"
            replies_by_key[key][reply.row] = reply
    return replies_by_key


def get_answers_context(
    params: ComparisonParams, replies: dict[str, dict[int, Reply]]
) -> dict[str, Any]:
    if params.prompts is None:
        return {"params": params}
    columns = params.columns
    jobs = {
        job.key: job
        for job in Job.objects.filter(
            kind=evaluation_replies.KIND, key__startswith=f"{params.prompts.pk}:"
        )
    }
    reply_columns = [replies[column.key] for column in columns]
    lines = answer_table.build_table_rows(
        params.prompts.rows, reply_columns, params.order, page=params.page
    )
    column_jobs = [jobs.get(f"{params.prompts.pk}:{column.key}") for column in columns]
    heads = [
        {
            "responder": responder,
            "job": job,
            "pending": job is not None and job.is_open,
            "address": params.build_url(order=f"worst-{index}", page=1),
        }
        for index, (responder, job) in enumerate(zip(columns, column_jobs, strict=True))
    ]
    has_pending = any(head["pending"] for head in heads)
    return {
        "params": params,
        "heads": heads,
        "lines": lines,
        "metrics": METRICS,
        "prompts_id": params.prompts.pk,
        "pages": [
            (page, params.build_url(page=page))
            for page in range(1, -(-len(params.prompts.rows) // answer_table.ROWS_PER_PAGE) + 1)
        ],
        "poll_address": params.build_url("adapters-answers") if has_pending else "",
        "missing": any(task is None or task.state == JobState.FAILED for task in column_jobs),
        "by_row": params.build_url(order="row", page=1),
        "by_disagreement": params.build_url(order="disagreement", page=1),
        "verdicts": build_verdicts(
            [
                build_contender(version, list(replies[f"v{version.pk}"].values()))
                for version in params.versions
            ]
        ),
    }


@require_POST
def request_replies(request: AuthenticatedRequest) -> HttpResponse:
    """Generate replies to a prompt set that exists, is drawn from data, or is pasted."""
    params = parse_params(request, request.POST)
    prompts = params.prompts
    if request.POST.get("text", "").strip():
        prompts = prompt_sets.paste_prompts(
            request.user, request.POST["text"], request.POST.get("name", "")
        )
    elif prompts is None and request.POST.get("data"):
        data = get_visible_version(request.user, parse_int_or_zero(request.POST["data"]))
        prompts = prompt_sets.draw_prompts(
            request.user, data, parse_int_or_zero(request.POST.get("count", ""))
        )
    if prompts is None:
        raise UserError(
            "Choose a prompt set, draw prompts from data, or paste some.", field="prompts"
        )
    # The base models last: their replies are the longest
    for responder in sorted(params.columns, key=lambda column: column.version is None):
        evaluation_replies.request_replies(request.user, prompts, responder)
    return redirect(f"{params.build_url(prompts=prompts.pk, page=1)}#answers")


@require_POST
def delete_prompts(request: AuthenticatedRequest, prompts_id: int) -> HttpResponse:
    """Delete a prompt set and return to the same versions."""
    prompts = get_changeable(PromptSet, request.user, prompts_id)
    params = parse_params(request, request.POST)
    prompt_sets.delete_prompts(request.user, prompts)
    return redirect(params.build_url(prompts=None, page=1))


@require_POST
def analyze_weights(request: AuthenticatedRequest) -> JsonResponse:
    """How much the versions change their base model's weights, and how similar they are. The first
    visitor starts the analysis; its result is stored.
    """
    params = parse_params(request, request.POST)
    job = weight_analysis.enqueue_analysis(
        request.user, params.versions, retry_failed=request.POST.get("again") == "1"
    )
    payload = {
        "state": job.state,
        "message": job.progress_message,
        "error": job.error,
        "result": job.result,
    }
    return JsonResponse(
        {**payload, "versions": [{"id": str(one.pk), "name": str(one)} for one in params.versions]}
    )


def parse_pair(
    request: AuthenticatedRequest, form: QueryDict
) -> tuple[PromptSet, AdapterVersion, AdapterVersion]:
    """Raises NotFound for something that the user may not see, UserError if the two versions are
    the same.
    """
    prompts = get_visible(PromptSet, request.user, parse_int_or_zero(form.get("prompts", "")))
    first, second = (
        get_visible(AdapterVersion, request.user, parse_int_or_zero(form.get(name, "")))
        for name in ("first", "second")
    )
    if first.pk == second.pk:
        raise UserError("Choose two different versions.", field="second")
    return (prompts, *votes.order_pair(first, second))


@require_safe
def show_next_vote(request: AuthenticatedRequest) -> HttpResponse:
    """The next row to vote on. The page does not contain which side belongs to which version."""
    prompts, first, second = parse_pair(request, request.GET)
    values = {
        "prompts": prompts,
        "first": first,
        "second": second,
        **get_vote_context(request, prompts, first, second),
    }
    return render(request, "adapters/vote.html", values)


def get_vote_context(
    request: AuthenticatedRequest, prompts: PromptSet, first: AdapterVersion, second: AdapterVersion
) -> dict[str, Any]:
    pair = votes.get_next_pair(request.user, prompts, first, second)
    row = prompts.rows[pair.row] if pair else None
    vote_count = votes.count_own_votes(request.user, prompts, first, second)
    # Hidden until the end, because it would bias the votes that are left
    return {
        "pair": pair,
        "row": row,
        "vote_count": vote_count,
        "rate": None if pair else votes.get_win_rate(first, second, prompts),
    }


@require_POST
def cast_vote(request: AuthenticatedRequest) -> HttpResponse:
    prompts, first, second = parse_pair(request, request.POST)
    votes.cast_vote(
        request.user,
        prompts,
        (first, second),
        parse_int_or_zero(request.POST.get("row", "")),
        request.POST.get("choice", ""),
    )
    query = f"prompts={prompts.pk}&first={first.pk}&second={second.pk}"
    return redirect(f"{reverse('adapters-vote')}?{query}")
