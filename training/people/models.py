"""Users, teams, API tokens, and the base class of everything that a user owns."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Self

from django.contrib.auth.models import AbstractUser
from django.db import models
from django.db.models import Q
from django.utils import timezone

from training.engine.files import measure_tree


class User(AbstractUser):
    """A user. Users with `is_superuser` are the admins of SnapML."""

    must_change_password = models.BooleanField(default=False)
    default_team = models.ForeignKey(
        "Team", null=True, blank=True, on_delete=models.SET_NULL, related_name="+"
    )
    guide_dismissed = models.BooleanField(default=False)
    max_disk_bytes = models.PositiveBigIntegerField(null=True, blank=True)  # null: default

    def get_sharing_team(self) -> Team | None:
        """The team that the user's new items are shared with: the one they chose, if they are a
        member or lead of it.

        Users choose it themselves, so that adding a user to a team does not share their items.
        """
        teams = Team.objects.filter(
            memberships__user=self, memberships__role__in=(Role.MEMBER, Role.LEAD)
        )
        return teams.filter(pk=self.default_team_id or 0).first()


class Role(models.TextChoices):
    VIEWER = "viewer", "Viewer"  # sees the team's items
    MEMBER = "member", "Member"  # shares items with the team and changes their own
    LEAD = "lead", "Lead"  # changes the team's items and its members


class Team(models.Model):
    name = models.CharField(max_length=80, unique=True)
    members = models.ManyToManyField(User, through="Membership", related_name="teams", blank=True)
    max_disk_bytes = models.PositiveBigIntegerField(null=True, blank=True)  # null: no limit

    def __str__(self) -> str:
        return self.name


class Membership(models.Model):
    user = models.ForeignKey(User, on_delete=models.CASCADE, related_name="memberships")
    team = models.ForeignKey(Team, on_delete=models.CASCADE, related_name="memberships")
    role = models.CharField(max_length=10, choices=Role.choices, default=Role.MEMBER)

    class Meta:
        ordering = ["user__username"]
        constraints = [models.UniqueConstraint(fields=["user", "team"], name="unique_membership")]

    def __str__(self) -> str:
        return f"{self.user.username}, {self.get_role_display().lower()} of {self.team}"


class Scope(models.TextChoices):
    READ = "read", "Read"
    WRITE = "write", "Read and write"


class ApiToken(models.Model):
    """A token for the API. Only its SHA-256 is stored; 256 random bits need no slow hash."""

    user = models.ForeignKey(User, on_delete=models.CASCADE, related_name="tokens")
    name = models.CharField(max_length=80)
    digest = models.CharField(max_length=64, unique=True)
    hint = models.CharField(max_length=12)
    scope = models.CharField(max_length=10, choices=Scope.choices, default=Scope.WRITE)
    created_at = models.DateTimeField(auto_now_add=True)
    last_used_at = models.DateTimeField(null=True)
    expires_at = models.DateTimeField(null=True)  # never, if empty
    revoked_at = models.DateTimeField(null=True)

    @property
    def is_expired(self) -> bool:
        return self.expires_at is not None and self.expires_at <= timezone.now()


class SignInAttempts(models.Model):
    """Sign-in attempts from one address, for one username or for all, until `ends_at`."""

    key = models.CharField(max_length=64, primary_key=True)  # a SHA-256
    count = models.PositiveIntegerField(default=0)
    ends_at = models.DateTimeField(db_index=True)


class OwnedQuerySet(models.QuerySet[Any]):
    def visible_to(self, user: User) -> Self:
        """The user's own items and those of their teams. Admins see all."""
        if user.is_superuser:
            return self.all()
        is_own = Q(owner=user) | Q(team__in=user.teams.values("pk"))
        return self.filter(is_own)

    def changeable_by(self, user: User) -> Self:
        """The user's own items and those of teams that they lead. Admins may change all."""
        if user.is_superuser:
            return self.all()
        led_teams = user.memberships.filter(role=Role.LEAD).values("team")
        return self.filter(Q(owner=user) | Q(team__in=led_teams))


class Owned(models.Model):
    """An item that belongs to a user and may be shared with one team."""

    owner = models.ForeignKey(User, on_delete=models.PROTECT, related_name="+")
    team = models.ForeignKey(Team, null=True, on_delete=models.SET_NULL, related_name="+")
    objects: ClassVar[Any] = OwnedQuerySet.as_manager()

    class Meta:
        abstract = True


class Stored(models.Model):
    """An item with files below SNAPML_HOME, which count towards the disk quotas of its owner and
    team (disk_quota.py). While files are being written, `disk_bytes` is what they may take.
    """

    disk_bytes = models.PositiveBigIntegerField(default=0)

    class Meta:
        abstract = True

    def list_folders(self) -> list[Path]:
        raise NotImplementedError

    def measure_disk_bytes(self) -> int:
        return sum(measure_tree(folder) for folder in self.list_folders())

    def update_disk_bytes(self) -> None:
        """Store what the files take now. The item may have been deleted."""
        self.disk_bytes = self.measure_disk_bytes()
        type(self)._base_manager.filter(pk=self.pk).update(disk_bytes=self.disk_bytes)
