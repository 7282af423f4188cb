"""What will be trained of a data set with a chosen model: token colours, shares, and a histogram of
lengths.
"""

from __future__ import annotations

from typing import Any

from django.http import HttpResponse
from django.shortcuts import render

from training.catalog.models import BaseModel, ModelState
from training.datasets.preview import raw_rows
from training.datasets.visible import visible_data
from training.engine.config import RunConfig
from training.errors import NotFound, UserError
from training.people.requests import SignedIn, number
from training.runs.forecast import token_lengths

ROWS = 4


def trained(request: SignedIn, version_id: int) -> HttpResponse:
    """A fragment: `?model=&length=&split=&page=&prompt=on`. The first model that is ready is taken
    if none is named.
    """
    version = visible_data(request.user, version_id)
    if version is None:
        raise NotFound(f"There is no data version {version_id} that you may see.")
    models = list(BaseModel.objects.filter(state=ModelState.READY).order_by("name"))
    wanted = number(request.GET.get("model", ""))
    model = next((one for one in models if one.pk == wanted), models[0] if models else None)
    split = request.GET.get("split", "train")
    counts = {
        "train": version.train_rows,
        "heldout": version.heldout_rows,
        "test": version.test_rows,
    }
    split = split if counts.get(split) else "train"
    prompt = request.GET.get("prompt") == "on"
    values: dict[str, Any] = {
        "version": version,
        "models": models,
        "model": model,
        "split": split,
        "prompt": prompt,
    }
    values |= {
        "lengths": token_lengths.LENGTHS,
        "start": number(request.GET.get("start", "0")),
        "length": 512,
    }
    if model is not None:
        try:
            values |= shown(request, values)
        except UserError as error:
            values["error"] = error
    return render(request, "runs/_trained.html", values)


def shown(request: SignedIn, asked: dict[str, Any]) -> dict[str, Any]:
    version, model, split, prompt = (
        asked["version"],
        asked["model"],
        asked["split"],
        asked["prompt"],
    )
    length = number(request.GET.get("length", "")) or asked["length"]
    length = min(max(8, length), 131_072)
    found = token_lengths.lengths(version, model, train_on_prompt=prompt, split=split)
    start = min(asked["start"], max(0, found.rows - 1))
    rows = raw_rows(version, split, start, ROWS)
    told = token_lengths.tokens_of(model, rows, max_length=length, train_on_prompt=prompt)
    config = RunConfig(max_length=length, max_tokens_per_batch=max(1024, length))
    return {
        "length": length,
        "rows": list(enumerate(told["rows"], start=start + 1)),
        "template": told["template"],
        "facts": token_lengths.cut_at(found, length),
        "padding": token_lengths.padding(found, config),
        "histogram": token_lengths.histogram(found) | {"length": length},
        "earlier": max(0, start - ROWS) if start else None,
        "later": start + ROWS if start + ROWS < found.rows else None,
    }
