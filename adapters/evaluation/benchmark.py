"""The method benchmark: one run of each method on the same data, base model and
budget, and a report of their cost and quality.
"""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from typing import Any

from adapters.evaluation import prompt_sets
from adapters.evaluation import replies as evaluation_replies
from adapters.evaluation.figures import get_answer_rate
from adapters.evaluation.replies import Responder
from adapters.evaluation.scores import mean_or_none
from adapters.models import AdapterVersion, PromptSet, Reply
from adapters.registry.model_card import escape_markdown
from training.catalog.models import BaseModel
from training.datasets.models import DatasetVersion
from training.engine.methods import METHODS
from training.engine.metrics import METRICS, Figure
from training.errors import Conflict, UserError, to_one_line
from training.formatting import format_value
from training.gpus.ledger import get_run_seconds
from training.people.models import User
from training.runs.launch.request import LaunchRequest, launch_runs
from training.runs.models import MAX_NAME_LENGTH, Run, Sweep
from training.runs.queue.placement import DEFAULT_PLACEMENT, Placement
from training.runs.states import UNFINISHED

BENCHMARK_METHODS = ("full", "lora", "qlora", "prefix", "prompt", "bottleneck")
MAX_STEPS = 100_000
NUM_PROMPTS = 40
GRID_SETTING = "method"


@dataclass(frozen=True)
class Budget:
    """What all runs have in common: optimizer steps, tokens per batch, maximum length and seed."""

    max_steps: int = 60
    max_tokens_per_batch: int = 1024
    max_length: int = 512
    seed: int = 0

    def to_settings(self) -> dict[str, Any]:
        interval = max(1, self.max_steps // 6)
        return {**vars(self), "eval_steps": interval, "save_steps": interval}


def launch_benchmark(
    user: User,
    base_model: BaseModel,
    data: DatasetVersion,
    budget: Budget,
    *,
    name: str = "",
    placement: Placement = DEFAULT_PLACEMENT,
) -> Sweep:
    """Launch a run of each method, with the method's default settings under the budget. A method
    that can never start on these devices is skipped, and the report says why.

    Raises:
        UserError: an invalid budget or setting, or no method can start.
    """
    if not 1 <= budget.max_steps <= MAX_STEPS:
        raise UserError(
            f"A benchmark takes from 1 to {MAX_STEPS:,} steps per method.", field="max_steps"
        )
    request = LaunchRequest(
        user=user,
        base_model=base_model,
        data=data,
        settings={**budget.to_settings(), GRID_SETTING: list(BENCHMARK_METHODS)},
        name=to_one_line(name)[:MAX_NAME_LENGTH]
        or f"All methods on {data.dataset.name}"[:MAX_NAME_LENGTH],
        placement=placement,
        skip_impossible=True,
    )
    sweep = launch_runs(request, accept_warnings=True)
    assert isinstance(sweep, Sweep)
    return sweep


def is_benchmark(sweep: Sweep) -> bool:
    return list(sweep.grid) == [GRID_SETTING] and set(sweep.grid[GRID_SETTING]) == set(
        BENCHMARK_METHODS
    )


@dataclass(frozen=True)
class BenchmarkRow:
    """A method's row of the report. Shares are from 0 to 1; None has not been measured."""

    run: Run
    version: AdapterVersion | None
    trainable_share: float | None
    peak_bytes: int | None
    memory_saved: float | None  # relative to full fine-tuning's peak
    eval_loss: float | None
    loss_over_full: float | None
    exact_match: float | None
    fields: float | None
    speed_over_base: float | None
    size_bytes: int | None
    minutes: float | None

    @property
    def title(self) -> str:
        return METHODS[self.run.method].title


def build_report(sweep: Sweep) -> list[BenchmarkRow]:
    """One row per method, in the order of BENCHMARK_METHODS."""
    runs = {run.method: run for run in sweep.runs.select_related("base_model", "data__dataset")}
    versions = {method: run.get_result_version() for method, run in runs.items()}
    full = runs.get("full")
    prompts = get_prompt_set(sweep)
    replies_by_version = get_replies_by_version(prompts) if prompts else {}
    base_rate = get_answer_rate(replies_by_version.get(None, []))
    return [
        build_row(runs[method], versions[method], full, replies_by_version, base_rate)
        for method in BENCHMARK_METHODS
        if method in runs
    ]


def build_row(
    run: Run,
    version: AdapterVersion | None,
    full: Run | None,
    replies_by_version: dict[int | None, list[Reply]],
    base_rate: float | None,
) -> BenchmarkRow:
    replies = replies_by_version.get(version.pk, []) if version else []
    trained, parameters = (
        run.start_info.get("trainable_parameters"),
        run.start_info.get("parameters"),
    )
    peak, full_peak = run.peak_memory_bytes or None, full.peak_memory_bytes if full else 0
    loss, full_loss = run.best_eval_loss, full.best_eval_loss if full else None
    exact_match = mean_or_none(
        [reply.scores["exact"] for reply in replies if "exact" in reply.scores]
    )
    rate, seconds = get_answer_rate(replies), get_run_seconds(run.pk)
    return BenchmarkRow(
        run=run,
        version=version,
        trainable_share=trained / parameters if trained and parameters else None,
        peak_bytes=peak,
        memory_saved=1 - peak / full_peak if peak and full_peak else None,
        eval_loss=loss,
        loss_over_full=loss / full_loss if loss is not None and full_loss else None,
        exact_match=exact_match if exact_match is not None else run.exact_match,
        fields=mean_or_none(
            [reply.scores["fields"] for reply in replies if "fields" in reply.scores]
        ),
        speed_over_base=rate / base_rate if rate and base_rate else None,
        size_bytes=version.size_bytes if version else None,
        minutes=seconds / 60 if seconds else None,
    )


def get_prompt_set(sweep: Sweep) -> PromptSet | None:
    """The prompt set of the benchmark's replies, if replies were requested."""
    return PromptSet.objects.filter(
        owner=sweep.owner, name__startswith=f"Benchmark {sweep.pk}: "
    ).first()


def get_replies_by_version(prompts: PromptSet) -> dict[int | None, list[Reply]]:
    replies_by_version: dict[int | None, list[Reply]] = {}
    for reply in Reply.objects.filter(prompts=prompts):
        replies_by_version.setdefault(reply.version_id, []).append(reply)
    return replies_by_version


def request_all_replies(user: User, sweep: Sweep) -> PromptSet:
    """Generate the replies of the base model and every version to the same held-out prompts.
    Existing replies are kept.

    Raises:
        Conflict: a run has not finished, so that its version would be missing.
    """
    runs = list(sweep.runs.select_related("base_model", "data__dataset"))
    if any(run.state in UNFINISHED for run in runs) or not runs:
        raise Conflict(
            "Some runs have not finished. Wait until all of them have.", code="unfinished_runs"
        )
    prompts = get_prompt_set(sweep) or prompt_sets.draw_prompts(
        sweep.owner, runs[0].data, NUM_PROMPTS, title=f"Benchmark {sweep.pk}: "
    )
    for version in AdapterVersion.objects.filter(run__in=runs).select_related("base_model"):
        evaluation_replies.request_replies(user, prompts, Responder(version.base_model, version))
    evaluation_replies.request_replies(user, prompts, Responder(runs[0].base_model))
    return prompts


COLUMNS: tuple[Figure, ...] = (
    Figure("trainable_share", "Trained share", "share"),
    Figure("peak_bytes", "Peak memory", "bytes", decimals=2),
    Figure("memory_saved", "Memory saved vs. full", "share"),
    METRICS["eval_loss"],
    Figure("loss_over_full", "Loss vs. full", decimals=2),
    Figure("exact_match", "Exact match", "share"),
    Figure("fields", "Correct fields", "share"),
    Figure("speed_over_base", "Inference speed vs. base", decimals=2),
    Figure("size_bytes", "Size", "bytes", decimals=2),
    Figure("minutes", "Device minutes", decimals=1),
)


def format_cell(value: float | None, column: Figure) -> str:
    """Format a cell for people; small shares keep three digits."""
    if value is not None and column.unit == "share":
        return f"{100 * value:.3g}%"
    return format_value(value, column.unit, column.decimals)


def format_row(row: BenchmarkRow) -> list[str]:
    return [format_cell(getattr(row, column.name), column) for column in COLUMNS]


def get_skipped_methods(sweep: Sweep) -> list[tuple[str, str]]:
    """Title and reason of each method that was not started."""
    titles = (METHODS[method].title for method in BENCHMARK_METHODS)
    return [(title, sweep.impossible[title]) for title in titles if title in sweep.impossible]


def format_csv(sweep: Sweep, rows: list[BenchmarkRow]) -> str:
    """Plain numbers: bytes, shares of 1, minutes."""
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    writer.writerow(["Method", *(column.title for column in COLUMNS)])
    writer.writerows(
        [row.title, *(getattr(row, column.name) for column in COLUMNS)] for row in rows
    )
    writer.writerows(
        [title, f"not started: {reason}"] for title, reason in get_skipped_methods(sweep)
    )
    return buffer.getvalue()


def format_markdown(sweep: Sweep, rows: list[BenchmarkRow]) -> str:
    titles = ["Method", *(column.title for column in COLUMNS)]
    lines = [
        f"# {escape_markdown(sweep.name)}",
        "",
        f"| {' | '.join(titles)} |",
        f"|{'---|' * len(titles)}",
    ]
    lines += [f"| {' | '.join([row.title, *format_row(row)])} |" for row in rows]
    lines += [
        f"\n{title} was not started: {escape_markdown(reason)}"
        for title, reason in get_skipped_methods(sweep)
    ]
    return "\n".join(lines) + "\n"
