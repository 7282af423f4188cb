"""The view of the tokens that a model would be trained on: colored rows of a dataset, shares, and a
histogram of lengths.
"""

from __future__ import annotations

from typing import Any

from django.http import HttpResponse
from django.shortcuts import render
from django.urls import reverse
from django.utils.http import urlencode
from django.views.decorators.http import require_safe

from training.catalog.models import BaseModel, ModelState
from training.catalog.option_sources import READY_MODELS
from training.datasets.permissions import get_visible_version
from training.datasets.preview import load_rows
from training.engine.config import RunConfig
from training.errors import UserError
from training.people.options import list_options
from training.people.requests import AuthenticatedRequest, parse_int_or_zero
from training.runs.forecast import token_lengths

ROWS_PER_PAGE = 4


@require_safe
def show_training_tokens(request: AuthenticatedRequest, version_id: int) -> HttpResponse:
    """A fragment: `?model=&length=&split=&start=&prompt=on`. The default model is the first that is
    ready.
    """
    version = get_visible_version(request.user, version_id)
    ready_models = BaseModel.objects.filter(state=ModelState.READY).order_by("name")
    model_id = parse_int_or_zero(request.GET.get("model", ""))
    model = ready_models.filter(pk=model_id).first() or ready_models.first()
    split = request.GET.get("split", "train")
    counts = {
        "train": version.train_rows,
        "eval": version.eval_rows,
        "test": version.test_rows,
    }
    split = split if counts.get(split) else "train"
    prompt = request.GET.get("prompt") == "on"
    values: dict[str, Any] = {
        "version": version,
        "models": list_options(request.user, READY_MODELS, model.pk if model else ""),
        "model": model,
        "split": split,
        "prompt": prompt,
    }
    values |= {
        "lengths": token_lengths.LENGTH_CHOICES,
        "start": parse_int_or_zero(request.GET.get("start", "0")),
        "length": 512,
    }
    if model is not None:
        try:
            values |= build_token_context(request, values)
        except UserError as error:
            values["error"] = error
    return render(request, "runs/_trained.html", values)


def build_token_context(request: AuthenticatedRequest, query: dict[str, Any]) -> dict[str, Any]:
    version, model, split, prompt = (
        query["version"],
        query["model"],
        query["split"],
        query["prompt"],
    )
    length = parse_int_or_zero(request.GET.get("length", "")) or query["length"]
    length = min(max(8, length), 131_072)
    lengths = token_lengths.get_lengths(version, model, train_on_prompt=prompt, split=split)
    start = min(query["start"], max(0, lengths.rows - 1))
    next_start = start + ROWS_PER_PAGE
    rows = load_rows(version, split, start, ROWS_PER_PAGE)
    preview = token_lengths.preview_tokens(model, rows, max_length=length, train_on_prompt=prompt)
    config = RunConfig(max_length=length, max_tokens_per_batch=max(1024, length))
    return {
        "length": length,
        "rows": list(enumerate(preview["rows"], start=start + 1)),
        "template": preview["template"],
        "facts": token_lengths.get_truncation_stats(lengths, length),
        "padding": token_lengths.compute_padding(lengths, config),
        "histogram": token_lengths.build_histogram(lengths) | {"length": length},
        "earlier": build_page_url(query, length, max(0, start - ROWS_PER_PAGE)) if start else "",
        "later": build_page_url(query, length, next_start) if next_start < lengths.rows else "",
    }


def build_page_url(query: dict[str, Any], length: int, start: int) -> str:
    """The address of the fragment whose first row is `start`."""
    params = {"model": query["model"].pk, "length": length, "split": query["split"], "start": start}
    params |= {"prompt": "on"} if query["prompt"] else {}
    return f"{reverse('data-trained', args=[query['version'].pk])}?{urlencode(params)}"
