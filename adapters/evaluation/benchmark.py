"""Try all methods: one run each on the same data, base and budget, and one report of what each cost
and brought. No torch.
"""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from typing import Any

from adapters.evaluation import prompt_sets
from adapters.evaluation import replies as evaluation_replies
from adapters.evaluation.figures import rate_of
from adapters.evaluation.replies import Column
from adapters.evaluation.scores import mean
from adapters.models import AdapterVersion, PromptSet, Reply
from adapters.registry.model_card import plain
from training.catalog.models import BaseModel
from training.datasets.models import DatasetVersion
from training.engine.methods import METHODS
from training.engine.metrics import METRICS, Figure
from training.errors import Conflict, UserError, one_line
from training.formatting import format_value
from training.gpus.ledger import used_by_run
from training.people.models import User
from training.runs.launch.request import LaunchRequest, launch_runs
from training.runs.models import MAX_NAME, Run, Sweep
from training.runs.queue.placement import DEFAULT_PLACEMENT, Placement
from training.runs.states import OPEN

BENCHMARK_METHODS = ("full", "lora", "qlora", "prefix", "prompt", "bottleneck")
MOST_STEPS = 100_000
ASKED = 40
GRID = "method"


@dataclass(frozen=True)
class Budget:
    """What every run gets alike: optimizer steps, tokens a step, and the longest row."""

    max_steps: int = 60
    max_tokens_per_batch: int = 1024
    max_length: int = 512
    seed: int = 0

    def settings(self) -> dict[str, Any]:
        often = max(1, self.max_steps // 6)
        return {**vars(self), "eval_steps": often, "save_steps": often}


def launch_bakeoff(
    user: User,
    base_model: BaseModel,
    data: DatasetVersion,
    budget: Budget,
    *,
    name: str = "",
    placement: Placement = DEFAULT_PLACEMENT,
) -> Sweep:
    """A run of each method, with its usual settings under the budget; one that could never start
    here is left out, and the report says why.

    Raises:
        UserError: a budget that cannot be; whatever a launch refuses; no method could start.
    """
    if not 1 <= budget.max_steps <= MOST_STEPS:
        raise UserError(
            f"A bake-off takes from 1 to {MOST_STEPS:,} steps a method.", field="max_steps"
        )
    request = LaunchRequest(
        user=user,
        base_model=base_model,
        data=data,
        settings={**budget.settings(), GRID: list(BENCHMARK_METHODS)},
        name=one_line(name)[:MAX_NAME] or f"All methods on {data.dataset.name}"[:MAX_NAME],
        placement=placement,
        skip_impossible=True,
    )
    sweep = launch_runs(request, accept_warnings=True)
    assert isinstance(sweep, Sweep)
    return sweep


def is_bakeoff(sweep: Sweep) -> bool:
    return list(sweep.grid) == [GRID] and set(sweep.grid[GRID]) == set(BENCHMARK_METHODS)


@dataclass(frozen=True)
class Row:
    """A method's line of the report. Shares are of 1; what has not been measured is None."""

    run: Run
    version: AdapterVersion | None
    trainable_share: float | None
    peak_bytes: int | None
    memory_saved: float | None  # of full fine-tuning's peak
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


def report(sweep: Sweep) -> list[Row]:
    """A row each, in the order of METHODS."""
    runs = {run.method: run for run in sweep.runs.select_related("base_model", "data__dataset")}
    versions = {method: run.result() for method, run in runs.items()}
    full = runs.get("full")
    asked = prompts_of(sweep)
    said = replies_to(asked) if asked else {}
    base_rate = rate_of(said.get(None, []))
    return [
        row_of(runs[method], versions[method], full, said, base_rate)
        for method in BENCHMARK_METHODS
        if method in runs
    ]


def row_of(
    run: Run,
    version: AdapterVersion | None,
    full: Run | None,
    said: dict[int | None, list[Reply]],
    base_rate: float | None,
) -> Row:
    replies = said.get(version.pk, []) if version else []
    trained, parameters = run.plan.get("trainable_parameters"), run.plan.get("parameters")
    peak, most = run.peak_memory_bytes or None, full.peak_memory_bytes if full else 0
    loss, best = run.best_eval_loss, full.best_eval_loss if full else None
    exact = mean([reply.scores["exact"] for reply in replies if "exact" in reply.scores])
    rate, seconds = rate_of(replies), used_by_run(run.pk)
    return Row(
        run=run,
        version=version,
        trainable_share=trained / parameters if trained and parameters else None,
        peak_bytes=peak,
        memory_saved=1 - peak / most if peak and most else None,
        eval_loss=loss,
        loss_over_full=loss / best if loss is not None and best else None,
        exact_match=exact if exact is not None else run.exact_match,
        fields=mean([reply.scores["fields"] for reply in replies if "fields" in reply.scores]),
        speed_over_base=rate / base_rate if rate and base_rate else None,
        size_bytes=version.size_bytes if version else None,
        minutes=seconds / 60 if seconds else None,
    )


def prompts_of(sweep: Sweep) -> PromptSet | None:
    """The set that its versions were asked, if they have been."""
    return PromptSet.objects.filter(
        owner=sweep.owner, name__startswith=f"Bake-off {sweep.pk}: "
    ).first()


def replies_to(asked: PromptSet) -> dict[int | None, list[Reply]]:
    found: dict[int | None, list[Reply]] = {}
    for reply in Reply.objects.filter(prompts=asked):
        found.setdefault(reply.version_id, []).append(reply)
    return found


def ask_all(user: User, sweep: Sweep) -> PromptSet:
    """Ask the base and every version the same held-out prompts; what has answered is not asked
    again.

    Raises:
        Conflict: a run is not over yet, so its version would be missing.
    """
    runs = list(sweep.runs.select_related("base_model", "data__dataset"))
    if any(run.state in OPEN for run in runs) or not runs:
        raise Conflict("Some runs are not over yet; ask when all of them are.")
    chosen = prompts_of(sweep) or prompt_sets.draw_prompts(
        sweep.owner, runs[0].data, ASKED, title=f"Bake-off {sweep.pk}: "
    )
    for version in AdapterVersion.objects.filter(run__in=runs).select_related("base_model"):
        evaluation_replies.ask(user, chosen, Column(version.base_model, version))
    evaluation_replies.ask(user, chosen, Column(runs[0].base_model))
    return chosen


COLUMNS: tuple[Figure, ...] = (
    Figure("trainable_share", "Trained share", "share"),
    Figure("peak_bytes", "Peak memory", "bytes", decimals=2),
    Figure("memory_saved", "Memory saved against full", "share"),
    METRICS["eval_loss"],
    Figure("loss_over_full", "Loss over full's", decimals=2),
    Figure("exact_match", "Word for word right", "share"),
    Figure("fields", "Fields right", "share"),
    Figure("speed_over_base", "Answer speed over the base's", decimals=2),
    Figure("size_bytes", "Size", "bytes", decimals=2),
    Figure("minutes", "Minutes on a device", decimals=1),
)


def format_cell(value: float | None, column: Figure) -> str:
    """A cell of the report as people read it; small shares keep three digits."""
    if value is not None and column.unit == "share":
        return f"{100 * value:.3g} %"
    return format_value(value, column.unit, column.decimals)


def cells(row: Row) -> list[str]:
    return [format_cell(getattr(row, column.name), column) for column in COLUMNS]


def left_out(sweep: Sweep) -> list[tuple[str, str]]:
    """Title and reason of each method that was not started."""
    titles = (METHODS[method].title for method in BENCHMARK_METHODS)
    return [(title, sweep.refused[title]) for title in titles if title in sweep.refused]


def as_csv(sweep: Sweep, rows: list[Row]) -> str:
    """Plain numbers: bytes, shares of 1, minutes."""
    held = io.StringIO()
    writer = csv.writer(held)
    writer.writerow(["Method", *(column.title for column in COLUMNS)])
    writer.writerows(
        [row.title, *(getattr(row, column.name) for column in COLUMNS)] for row in rows
    )
    writer.writerows([title, f"not started: {why}"] for title, why in left_out(sweep))
    return held.getvalue()


def as_markdown(sweep: Sweep, rows: list[Row]) -> str:
    head = ["Method", *(column.title for column in COLUMNS)]
    lines = [f"# {plain(sweep.name)}", "", f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    lines += [f"| {' | '.join([row.title, *cells(row)])} |" for row in rows]
    lines += [f"\n{title} was not started: {plain(why)}" for title, why in left_out(sweep)]
    return "\n".join(lines) + "\n"
