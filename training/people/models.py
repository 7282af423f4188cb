"""Who there is, which team they are in, and what they may see. It knows none of the things they
own.
"""

from __future__ import annotations

from typing import Any, ClassVar, Self

from django.contrib.auth.models import AbstractUser
from django.db import models
from django.db.models import Q


class User(AbstractUser):
    """A person. `is_superuser` is an admin of SnapML."""

    must_change_password = models.BooleanField(default=False)
    default_team = models.ForeignKey(
        "Team", null=True, blank=True, on_delete=models.SET_NULL, related_name="+"
    )
    guide_dismissed = models.BooleanField(default=False)

    def get_sharing_team(self) -> Team | None:
        """The team that this person's new things are shared with: the one they chose, if they are
        more than a viewer of it.

        It is their own choice, so that nobody gets to see things by adding people to a team.
        """
        teams = Team.objects.filter(
            memberships__user=self, memberships__role__in=(Role.MEMBER, Role.LEAD)
        )
        return teams.filter(pk=self.default_team_id or 0).first()


class Role(models.TextChoices):
    VIEWER = "viewer", "Viewer"  # sees what the team has
    MEMBER = "member", "Member"  # shares with the team, and changes what is their own
    LEAD = "lead", "Lead"  # changes what the team has, and who is in it


class Team(models.Model):
    name = models.CharField(max_length=80, unique=True)
    members = models.ManyToManyField(User, through="Membership", related_name="teams", blank=True)

    def __str__(self) -> str:
        return self.name


class Membership(models.Model):
    user = models.ForeignKey(User, on_delete=models.CASCADE, related_name="memberships")
    team = models.ForeignKey(Team, on_delete=models.CASCADE, related_name="memberships")
    role = models.CharField(max_length=10, choices=Role.choices, default=Role.MEMBER)

    class Meta:
        ordering = ["user__username"]
        constraints = [models.UniqueConstraint(fields=["user", "team"], name="once_in_a_team")]

    def __str__(self) -> str:
        return f"{self.user.username}, {self.get_role_display().lower()} of {self.team}"


class Scope(models.TextChoices):
    READ = "read", "Read"
    WRITE = "write", "Read and write"


class ApiToken(models.Model):
    """A key for the API. Only its SHA-256 is stored; 256 random bits need no slow hash."""

    user = models.ForeignKey(User, on_delete=models.CASCADE, related_name="tokens")
    name = models.CharField(max_length=80)
    digest = models.CharField(max_length=64, unique=True)
    hint = models.CharField(max_length=12)
    scope = models.CharField(max_length=10, choices=Scope.choices, default=Scope.WRITE)
    created_at = models.DateTimeField(auto_now_add=True)
    last_used_at = models.DateTimeField(null=True)
    revoked_at = models.DateTimeField(null=True)


class SignInAttempts(models.Model):
    """Passwords that were tried from one address, for one name or for any, until `ends_at`."""

    key = models.CharField(max_length=64, primary_key=True)  # a SHA-256
    count = models.PositiveIntegerField(default=0)
    ends_at = models.DateTimeField(db_index=True)


class OwnedQuerySet(models.QuerySet[Any]):
    def visible_to(self, user: User) -> Self:
        """A person's own things and those of their teams; admins see all."""
        if user.is_superuser:
            return self.all()
        is_own = Q(owner=user) | Q(team__in=user.teams.values("pk"))
        return self.filter(is_own)

    def changeable_by(self, user: User) -> Self:
        """What a person may change: their own things, and those of the teams that they lead; admins
        all.
        """
        if user.is_superuser:
            return self.all()
        led_teams = user.memberships.filter(role=Role.LEAD).values("team")
        return self.filter(Q(owner=user) | Q(team__in=led_teams))


class Owned(models.Model):
    """Something that belongs to a person and, if they are in one, is shared with a team."""

    owner = models.ForeignKey(User, on_delete=models.PROTECT, related_name="+")
    team = models.ForeignKey(Team, null=True, on_delete=models.SET_NULL, related_name="+")
    objects: ClassVar[Any] = OwnedQuerySet.as_manager()

    class Meta:
        abstract = True
