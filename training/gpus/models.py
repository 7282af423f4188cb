"""Devices and their pools, the quotas of teams and users, the ledger of allocations, and the audit
log.

Runs are referred to by id only, because the ledger outlives them. Units: bytes, seconds,
device-hours.
"""

from __future__ import annotations

from typing import Any, NoReturn

from django.core.validators import MaxValueValidator, MinValueValidator
from django.db import models
from django.db.models import Q

from training.formatting import format_ago, format_bytes
from training.people.models import Team, User

MAX_RUNS_PER_DEVICE = 4


class Pool(models.Model):
    """Devices of one kind. Created when the first device of the kind reports."""

    name = models.CharField(max_length=80, unique=True)
    kind = models.CharField(max_length=80, unique=True)  # the device name that the driver reports
    runs_per_device = models.PositiveIntegerField(
        default=1, validators=[MinValueValidator(1), MaxValueValidator(MAX_RUNS_PER_DEVICE)]
    )
    # A run is not preempted earlier after its start
    min_run_seconds = models.PositiveIntegerField(default=600)
    is_on_hold = models.BooleanField(default=False)

    class Meta:
        ordering = ["name"]

    def __str__(self) -> str:
        return self.name


class Host(models.Model):
    """A machine with a worker that reports its devices."""

    name = models.CharField(max_length=200, unique=True)
    reported_at = models.DateTimeField()

    def __str__(self) -> str:
        return self.name


class Condition(models.TextChoices):
    GOOD = "good", "Good"
    CHECKING = "checking", "Checking"  # a run has just left it, and its memory may not be free yet
    DIRTY = "dirty", "Dirty"  # its memory stays in use although no run is on it
    MISSING = "missing", "Missing"  # its host reports without this device


class Device(models.Model):
    host = models.ForeignKey(Host, on_delete=models.PROTECT, related_name="devices")
    pool = models.ForeignKey(Pool, on_delete=models.PROTECT, related_name="devices")
    index = models.PositiveIntegerField()
    uuid = models.CharField(max_length=80, unique=True)
    name = models.CharField(max_length=80)
    total_bytes = models.PositiveBigIntegerField()
    used_bytes = models.PositiveBigIntegerField(default=0)
    # The part of them that SnapML's inference server uses
    inference_bytes = models.PositiveBigIntegerField(default=0)
    # What other processes used when the first of its current or last runs started
    baseline_bytes = models.PositiveBigIntegerField(default=0)
    utilization = models.FloatField(null=True)  # 0 to 1
    temperature = models.FloatField(null=True)  # degrees Celsius
    power_watts = models.FloatField(null=True)
    # Each with `pid` and `bytes`
    processes: models.JSONField[list[dict[str, int]], list[dict[str, int]]] = models.JSONField(
        default=list
    )
    # What CUDA's context uses per process outside its allocator, measured once
    context_bytes = models.PositiveBigIntegerField(null=True)
    condition = models.CharField(max_length=10, choices=Condition.choices, default=Condition.GOOD)
    # The run for which another run was evicted here
    reserved_for = models.PositiveBigIntegerField(null=True)
    condition_changed_at = models.DateTimeField(null=True)
    last_busy_at = models.DateTimeField(null=True)  # last report with at least 5% utilization

    class Meta:
        ordering = ["host__name", "index"]

    def __str__(self) -> str:
        return f"{self.host.name} {self.index}"


class Quota(models.Model):
    """A team's quota in a pool. `team` is null for the users without a team.

    Without a row there is no guarantee and no limit.
    """

    pool = models.ForeignKey(Pool, on_delete=models.CASCADE, related_name="quotas")
    team = models.ForeignKey(Team, null=True, on_delete=models.CASCADE, related_name="quotas")
    guaranteed = models.PositiveIntegerField(default=0)
    limit = models.PositiveIntegerField(null=True)
    weight = models.FloatField(default=1.0)
    hours_per_month = models.FloatField(null=True)
    is_hard_budget = models.BooleanField(default=False)  # else only a warning
    max_bytes = models.PositiveBigIntegerField(null=True)
    max_run_seconds = models.PositiveIntegerField(null=True)
    has_admin_hold = models.BooleanField(default=False)
    has_lead_hold = models.BooleanField(default=False)

    class Meta:
        constraints = [
            models.UniqueConstraint(fields=["pool", "team"], name="one_quota_per_team_and_pool"),
            models.UniqueConstraint(
                fields=["pool"], condition=Q(team=None), name="one_quota_without_team"
            ),
            models.CheckConstraint(
                condition=Q(limit=None) | Q(limit__gte=models.F("guaranteed")),
                name="limit_at_least_guarantee",
            ),
            models.CheckConstraint(condition=Q(weight__gt=0), name="weight_is_positive"),
        ]

    @property
    def is_on_hold(self) -> bool:
        return self.has_admin_hold or self.has_lead_hold


class PersonalQuota(models.Model):
    """A user's limits over all pools together."""

    user = models.OneToOneField(User, on_delete=models.CASCADE, related_name="quota")
    max_running = models.PositiveIntegerField(null=True)
    max_queued = models.PositiveIntegerField(null=True)
    hours_per_month = models.FloatField(null=True)
    is_hard_budget = models.BooleanField(default=False)


class Allocation(models.Model):
    """A run's use of a device, from its admission until its process has ended. Created once and
    closed once.

    A device has as many slots as its pool lets runs share it. The unique constraint on the slot
    makes double booking impossible.
    """

    device = models.ForeignKey(Device, on_delete=models.PROTECT, related_name="allocations")
    slot = models.PositiveSmallIntegerField(default=0)
    run_id = models.PositiveBigIntegerField(db_index=True)
    run_name = models.CharField(max_length=120)
    user = models.ForeignKey(User, on_delete=models.PROTECT, related_name="+")
    team = models.ForeignKey(Team, null=True, on_delete=models.SET_NULL, related_name="+")
    priority = models.CharField(max_length=10)
    reserved_bytes = models.PositiveBigIntegerField(null=True)  # null: the whole device
    started_at = models.DateTimeField()
    evicted_at = models.DateTimeField(null=True)
    evicted_for = models.PositiveBigIntegerField(null=True)
    released_at = models.DateTimeField(null=True)

    class Meta:
        constraints = [
            models.UniqueConstraint(
                fields=["device", "slot"],
                condition=Q(released_at=None),
                name="one_run_per_device_slot",
            ),
            models.UniqueConstraint(
                fields=["run_id"], condition=Q(released_at=None), name="one_open_allocation_per_run"
            ),
            models.CheckConstraint(
                condition=Q(slot__lt=MAX_RUNS_PER_DEVICE), name="allocation_slot_in_range"
            ),
        ]
        indexes = [models.Index(fields=["started_at"]), models.Index(fields=["released_at"])]

    @property
    def description(self) -> str:
        parts = [f"since {format_ago(self.started_at)}"]
        if self.reserved_bytes:
            parts.append(f"{format_bytes(self.reserved_bytes)} reserved")
        if self.evicted_at:
            parts.append("saving a checkpoint to free the device")
        return ", ".join(parts)


class AuditEntry(models.Model):
    """Who did what, when and why. Entries are only added, and each has the digest of the previous
    one (audit.py).
    """

    at = models.DateTimeField()
    actor = models.ForeignKey(User, null=True, on_delete=models.SET_NULL, related_name="+")
    actor_name = models.CharField(max_length=150)  # "scheduler" if no user acted
    action = models.CharField(max_length=30)
    subject = models.CharField(max_length=200)
    team = models.ForeignKey(Team, null=True, on_delete=models.SET_NULL, related_name="+")
    before: models.JSONField[dict[str, Any], dict[str, Any]] = models.JSONField(default=dict)
    after: models.JSONField[dict[str, Any], dict[str, Any]] = models.JSONField(default=dict)
    reason = models.CharField(max_length=300, blank=True)
    previous = models.CharField(max_length=64, blank=True)
    digest = models.CharField(max_length=64, unique=True)

    class Meta:
        ordering = ["-pk"]
        indexes = [models.Index(fields=["action", "-at"]), models.Index(fields=["team", "-at"])]

    def save(self, *args: Any, **kwargs: Any) -> None:
        if self.pk is not None:
            raise TypeError("Audit entries cannot be changed.")
        super().save(*args, **kwargs)

    def delete(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError("Audit entries cannot be deleted.")
