"""Who there is, which team they are in, and what they may see. It knows none of the things they own."""

from __future__ import annotations

from typing import Any, ClassVar, Self

from django.contrib.auth.models import AbstractUser
from django.db import models
from django.db.models import Q


class User(AbstractUser):
    """A person. `is_superuser` is an admin of SnapML."""

    must_change_password = models.BooleanField(default=False)

    def first_team(self) -> Team | None:
        return self.teams.order_by("name").first()


class Team(models.Model):
    name = models.CharField(max_length=80, unique=True)
    members = models.ManyToManyField(User, related_name="teams", blank=True)

    def __str__(self) -> str:
        return self.name


class ApiToken(models.Model):
    """A key for the API. Only its SHA-256 is stored; 256 random bits need no slow hash."""

    user = models.ForeignKey(User, on_delete=models.CASCADE, related_name="tokens")
    name = models.CharField(max_length=80)
    digest = models.CharField(max_length=64, unique=True)
    hint = models.CharField(max_length=12)
    created_at = models.DateTimeField(auto_now_add=True)
    last_used_at = models.DateTimeField(null=True)
    revoked_at = models.DateTimeField(null=True)


class OwnedQuerySet(models.QuerySet[Any]):
    def visible_to(self, user: User) -> Self:
        """A person's own things and those of their teams; admins see all."""
        if user.is_superuser:
            return self.all()
        mine = Q(owner=user) | Q(team__in=user.teams.values("pk"))
        return self.filter(mine)


class Owned(models.Model):
    """Something that belongs to a person and, if they are in one, is shared with a team."""

    owner = models.ForeignKey(User, on_delete=models.PROTECT, related_name="+")
    team = models.ForeignKey(Team, null=True, on_delete=models.SET_NULL, related_name="+")
    objects: ClassVar[Any] = OwnedQuerySet.as_manager()

    class Meta:
        abstract = True
