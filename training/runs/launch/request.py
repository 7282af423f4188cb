"""Launch runs and sweeps. The launch page, the API, `manage.py launch`, YAML files, the benchmark
of all methods and continued training each create a `LaunchRequest`. `preview_launch` shows what
`launch_runs` would do, with the same members, plan and warnings.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from operator import attrgetter
from typing import Any

from django.db import transaction
from django.utils import timezone

from training.auto.plan_types import Plan
from training.catalog.models import BaseModel
from training.child_slots import SlotsBusy
from training.datasets.models import DatasetVersion
from training.engine.config import RunConfig
from training.engine.methods import METHODS
from training.errors import Conflict, UserError, to_one_line
from training.gpus.scheduling.state import NO_TEAM, WaitingRun
from training.people.disk_quota import check_disk_quota
from training.people.models import Team, User
from training.runs.forecast.batch_shapes import count_steps
from training.runs.forecast.memory import get_cached_forecast
from training.runs.forecast.memory_options import suggest_fitting_change
from training.runs.forecast.summary import (
    check_data_fits_model,
    check_excluded_rows,
    check_trained_tokens,
    collect_warnings,
    forecast_disk_bytes,
    forecast_run,
)
from training.runs.forecast.target_device import TargetDevice, get_target_device
from training.runs.forecast.token_lengths import (
    TokenLengths,
    get_cached_lengths,
    get_lengths,
)
from training.runs.launch.auto import AutoRequest, compute_plan_digest, make_run_plan
from training.runs.launch.services import (
    WarningsNotAccepted,
    check_model_ready,
    get_public_settings,
    get_run_team,
    prepare_run_dir,
)
from training.runs.launch.start_version import StartVersion, check_start_version
from training.runs.launch.sweep import (
    Member,
    collect_possible,
    compute_warning_id,
    expand_grid,
    split_grid,
)
from training.runs.models import MAX_NAME_LENGTH, Run, Sweep
from training.runs.queue import actions, checks
from training.runs.queue.placement import DEFAULT_PLACEMENT, Placement
from training.runs.signals import run_queued

MAX_STEPS = 2**31 - 1  # the column's limit


@dataclass(frozen=True, kw_only=True)
class LaunchRequest:
    """A request to launch a run or a sweep.

    `settings` may contain lists of values, which span a sweep. With `auto` they are empty, and
    `plan_digest`, if set, names the plan that the user reviewed; no other plan is launched.
    `skip_impossible` starts the members of a sweep that can run and records why the others cannot.
    """

    user: User
    base_model: BaseModel
    data: DatasetVersion
    settings: Mapping[str, Any] = field(default_factory=dict)
    auto: AutoRequest | None = None
    plan_digest: str | None = None
    name: str = ""
    placement: Placement = DEFAULT_PLACEMENT
    start_version: StartVersion | None = None
    skip_impossible: bool = False

    def to_json(self) -> dict[str, Any]:
        """The part of the request that is stored with a run, in addition to the run's own settings,
        so that the request can be repeated.
        """
        fields: dict[str, Any] = {}
        if self.start_version:
            fields["start_version"] = self.start_version.to_json()
        if self.auto:
            fields["auto"] = {"goal": self.auto.goal, "locked": dict(self.auto.locked)}
        elif any(isinstance(value, list) for value in self.settings.values()):
            fixed, grid = split_grid(self.settings)
            fields["settings"] = fixed | grid
            fields["name"] = to_one_line(self.name)  # the sweep's name; its runs have other names
        if self.skip_impossible:
            fields["skip_impossible"] = True
        return fields


@dataclass(frozen=True)
class LaunchLengths:
    """Token lengths of the training and the held-out rows; None: not measured yet."""

    train: TokenLengths | None = None
    held_out: TokenLengths | None = None

    def exclude_rows(self, config: RunConfig) -> LaunchLengths:
        """The lengths of the rows that a run with these settings uses."""
        return LaunchLengths(
            self.train and self.train.exclude_rows(config.excluded_rows),
            self.held_out
            and self.held_out.take_first(config.eval_rows).exclude_rows(config.excluded_eval_rows),
        )


@dataclass(frozen=True)
class ResolvedLaunch:
    """A checked request: the settings of every member, the plan, and the warnings."""

    request: LaunchRequest
    members: list[Member]
    grid: dict[str, list[Any]]
    plan: Plan | None
    target: TargetDevice
    lengths: dict[bool, LaunchLengths]  # by train_on_prompt
    warnings: list[str]
    impossible: dict[str, str]  # label of a member with wrong settings -> reason

    def lengths_for(self, config: RunConfig) -> TokenLengths | None:
        return self.lengths[config.train_on_prompt].exclude_rows(config).train

    def forecast_first_run(self) -> dict[str, Any]:
        """The forecast of the first member, with the warnings of all members."""
        config = self.members[0].config
        request, lengths = self.request, self.lengths_for(config)
        numbers = forecast_run(config, request.base_model, request.data, lengths, self.target)
        return numbers | {"warnings": self.warnings}


def resolve_request(
    request: LaunchRequest,
    *,
    plan: Plan | None = None,
    target: TargetDevice | None = None,
    wait: bool = True,
    measure: bool = False,
) -> ResolvedLaunch:
    """Check a request; preview and launch both use the result. Pass `plan` and `target` if they
    were already made for this request. With `measure`, token lengths that are missing are measured,
    so that data that the engine could not train is refused.

    Raises:
        ConfigError: a setting is wrong; `field` names it.
        TooLarge: the grid has too many runs.
        Conflict: the model is not ready, or the plan differs from the one that the user reviewed.
        NotAllowed: only admins can set this priority.
        PlanPending: with Auto and without `wait`, a measurement or a simulation has to run first.
        UserError: the model cannot be trained on this data.
    """
    check_model_ready(request.base_model)
    checks.check_priority(request.user, request.placement.priority)
    target = target or get_target_device(request.placement.pool)
    plan = resolve_plan(request, target, plan, wait=wait)
    settings = plan.settings if plan else request.settings
    grid, members, impossible = expand_grid(settings, skip_impossible=request.skip_impossible)
    if request.start_version:
        members, unstartable = collect_startable_members(request, request.start_version, members)
        impossible |= unstartable
    lengths = {
        train_on_prompt: find_launch_lengths(
            request, train_on_prompt=train_on_prompt, measure=measure
        )
        for train_on_prompt in {member.config.train_on_prompt for member in members}
    }
    members, untrainable = collect_trainable_members(request, lengths, members)
    impossible |= untrainable
    warnings = [
        warning
        for member in members
        for warning in collect_warnings(
            member.config,
            request.base_model,
            lengths[member.config.train_on_prompt].exclude_rows(member.config).train,
        )
    ]
    unique = list(dict.fromkeys(warnings))
    return ResolvedLaunch(request, members, grid, plan, target, lengths, unique, impossible)


def find_launch_lengths(
    request: LaunchRequest, *, train_on_prompt: bool, measure: bool
) -> LaunchLengths:
    """The token lengths of the data. They are None if they are not cached, or with `measure`, if
    measuring takes too long or too much memory here.

    Raises:
        UserError: the model's tokenizer fails on the data.
    """
    find_lengths = partial(
        get_lengths if measure else get_cached_lengths,
        request.data,
        request.base_model,
        train_on_prompt=train_on_prompt,
    )
    try:
        return LaunchLengths(
            held_out=find_lengths(split="eval") if request.data.eval_rows else None,
            train=find_lengths(),
        )
    except UserError as error:
        if isinstance(error, SlotsBusy) or error.code == "preview_failed":
            return LaunchLengths()
        raise


def collect_trainable_members(
    request: LaunchRequest, lengths: Mapping[bool, LaunchLengths], members: list[Member]
) -> tuple[list[Member], dict[str, str]]:
    """The members that can be trained on the data, and the label and reason of each that cannot.
    These are refusals: no `accept_warnings` skips them.

    Raises:
        UserError: a member cannot; with `skip_impossible`, no member can.
    """

    def check_member(member: Member) -> Member:
        config = member.config
        check_excluded_rows(config, request.data)
        used = lengths[config.train_on_prompt].exclude_rows(config)
        check_data_fits_model(
            used.held_out, skip_invalid_rows=config.skip_invalid_rows, split="held-out"
        )
        check_data_fits_model(used.train, skip_invalid_rows=config.skip_invalid_rows)
        check_trained_tokens(used.train, config)
        return member

    return collect_possible(
        members, check_member, attrgetter("label"), skip_impossible=request.skip_impossible
    )


def resolve_plan(
    request: LaunchRequest, target: TargetDevice, plan: Plan | None, *, wait: bool
) -> Plan | None:
    """The Auto plan of a request, made now if `plan` is None; None without Auto.

    Raises:
        UserError: `auto` is combined with `settings`, or `plan_digest` is used without `auto`.
        Conflict: the plan differs from the one that the user reviewed.
        PlanPending: see `make_run_plan`.
    """
    if request.auto is None:
        if request.plan_digest:
            raise UserError("plan_digest needs `auto`. Remove it.", field="plan_digest")
        return None
    if request.settings:
        raise UserError(
            "With `auto`, `settings` must be empty. Put fixed settings into `auto.locked`.",
            field="settings",
        )
    plan = plan or make_run_plan(request.base_model, request.data, request.auto, target, wait=wait)
    if request.plan_digest not in (None, compute_plan_digest(plan)):
        raise Conflict(
            "The plan has changed because free memory or a locked value changed. Review it and "
            "start again.",
            field="plan_digest",
        )
    return plan


def collect_startable_members(
    request: LaunchRequest, start: StartVersion, members: list[Member]
) -> tuple[list[Member], dict[str, str]]:
    """The members that can start from these weights, and the label and reason of each that cannot.

    Raises:
        ConfigError: a member cannot; with `skip_impossible`, no member can.
    """

    def check_member(member: Member) -> Member:
        check_start_version(start, request.base_model, member.config)
        return member

    return collect_possible(
        members, check_member, attrgetter("label"), skip_impossible=request.skip_impossible
    )


@dataclass(frozen=True)
class LaunchPreview:
    """What a launch would do: the number of runs, the plan, and the forecast of the first run."""

    runs: int
    grid: dict[str, list[Any]]
    config: RunConfig
    plan: Plan | None
    plan_digest: str
    forecast: dict[str, Any]
    is_measured: bool  # the data's token lengths are known for this model


def preview_launch(
    request: LaunchRequest,
    *,
    plan: Plan | None = None,
    target: TargetDevice | None = None,
    wait: bool = True,
) -> LaunchPreview:
    """Check and forecast a launch without starting anything.

    Raises:
        UserError: see `resolve_request`; or the method cannot be used with this model.
    """
    resolved = resolve_request(request, plan=plan, target=target, wait=wait)
    config = resolved.members[0].config
    return LaunchPreview(
        runs=len(resolved.members),
        grid=resolved.grid,
        config=config,
        plan=resolved.plan,
        plan_digest=compute_plan_digest(resolved.plan) if resolved.plan else "",
        forecast=resolved.forecast_first_run(),
        is_measured=resolved.lengths_for(config) is not None,
    )


def launch_runs(
    request: LaunchRequest,
    *,
    accept_warnings: bool = False,
    accepted_warnings: Collection[str] = (),
    plan: Plan | None = None,
    target: TargetDevice | None = None,
    wait: bool = True,
    as_sweep: bool = False,
) -> Run | Sweep:
    """Start a run, or a sweep if a setting has several values (or with `as_sweep`). Either all runs
    of a sweep are started or none.

    `accepted_warnings` are the ids (see `compute_warning_id`) of the warnings that the user
    accepted.

    Raises:
        WarningsNotAccepted: there are warnings that were not accepted.
        Conflict: the user has too many runs in the queue, or a disk quota would be exceeded.
        NotAllowed: the user is only a viewer of the data's team.
        UserError: no device or quota could ever run it; and see `resolve_request`.
    """
    team = get_run_team(request.user, request.data)
    resolved = resolve_request(request, plan=plan, target=target, wait=wait, measure=True)
    if not accept_warnings:
        not_accepted = [
            warning
            for warning in resolved.warnings
            if compute_warning_id(warning) not in accepted_warnings
        ]
        if not_accepted:
            raise WarningsNotAccepted(not_accepted)
    drafts, impossible = draft_runs(resolved, team)
    with transaction.atomic():
        checks.check_queue_limit(request.user, count=len(drafts))
        check_disk_quota(request.user, team, sum(draft.disk_bytes for draft in drafts))
        if resolved.grid or as_sweep:
            return create_sweep(resolved, team, drafts, impossible)
        return create_run(resolved, drafts[0], team, name=request.name)


@dataclass(frozen=True)
class RunDraft:
    """A member with its forecast steps, memory and disk space."""

    member: Member
    total_steps: int
    memory: dict[str, Any]
    disk_bytes: int


def draft_runs(
    resolved: ResolvedLaunch, team: Team | None
) -> tuple[list[RunDraft], dict[str, str]]:
    """Drafts of the members that can be scheduled, and the label and reason of each that cannot.

    Raises:
        UserError: no device or quota could ever run a member; with `skip_impossible`, any member.
    """
    drafts, unschedulable = collect_possible(
        resolved.members,
        lambda member: draft_run(resolved, member, team),
        attrgetter("label"),
        skip_impossible=resolved.request.skip_impossible,
    )
    return drafts, resolved.impossible | unschedulable


def draft_run(resolved: ResolvedLaunch, member: Member, team: Team | None) -> RunDraft:
    """Raises UserError: no device or quota could ever run it."""
    config, lengths = member.config, resolved.lengths_for(member.config)
    memory = (
        get_cached_forecast(config, resolved.request.base_model, lengths, resolved.target) or {}
    )
    check_schedulable(resolved, config, team, memory.get("peak"))
    steps = count_steps(lengths, config)[0] if lengths else config.max_steps
    disk_bytes = forecast_disk_bytes(config, resolved.request.base_model, memory)
    return RunDraft(member, min(steps, MAX_STEPS), memory, disk_bytes)


def check_schedulable(
    resolved: ResolvedLaunch, config: RunConfig, team: Team | None, peak: int | None
) -> None:
    """Raises UserError: no device or quota could ever run it. The message suggests what would
    fit.
    """
    request, target = resolved.request, resolved.target
    checks.check_schedulable(
        WaitingRun(0, team.pk if team else NO_TEAM, request.user.pk, 0.0, peak),
        target.pool,
        lambda max_bytes: suggest_fitting_change(
            config, request.base_model, request.data, max_bytes, target
        ),
    )


def create_sweep(
    resolved: ResolvedLaunch,
    team: Team | None,
    drafts: list[RunDraft],
    impossible: dict[str, str],
) -> Sweep:
    request = resolved.request
    varied = " x ".join(resolved.grid) or METHODS[drafts[0].member.config.method].title
    title = to_one_line(request.name) or f"{request.data.dataset.name}, {varied}"
    sweep = Sweep.objects.create(
        owner=request.user,
        team=team,
        name=title[:MAX_NAME_LENGTH],
        grid=resolved.grid,
        impossible=impossible,
    )
    for draft in drafts:
        name = f"{title}: {draft.member.label}" if draft.member.values else title
        create_run(resolved, draft, team, name=name, sweep=sweep)
    return sweep


def create_run(
    resolved: ResolvedLaunch,
    draft: RunDraft,
    team: Team | None,
    *,
    name: str,
    sweep: Sweep | None = None,
) -> Run:
    """Create the run's row and folder, and notify the workers after the commit."""
    request, config = resolved.request, draft.member.config
    default_name = f"{request.data.dataset.name}, {METHODS[config.method].title}"
    start = request.start_version
    run = Run.objects.create(
        owner=request.user,
        team=team,
        name=(to_one_line(name) or default_name)[:MAX_NAME_LENGTH],
        base_model=request.base_model,
        data=request.data,
        method=config.method,
        config=get_public_settings(config),
        request=request.to_json(),
        sweep=sweep,
        auto_plan=resolved.plan.to_json() if resolved.plan else {},
        start_version=start.version if start else None,
        total_steps=draft.total_steps,
        forecast=draft.memory,
        disk_bytes=draft.disk_bytes,
        pool=resolved.target.pool,
        priority=request.placement.priority,
        queued_at=timezone.now(),
    )
    actions.audit_priority(request.user, run)
    prepare_run_dir(run, config, start.folder if start else None)
    transaction.on_commit(lambda: run_queued.send(Run, run_id=run.pk))
    return run
