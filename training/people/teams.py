"""Teams and their members. Leads of a team and admins change them; a team keeps at least one
lead.
"""

from __future__ import annotations

from typing import Any

from django.db import transaction
from django.db.models import Prefetch, Q

from training.errors import Conflict, NotAllowed, NotFound, UserError, to_one_line
from training.people.models import Membership, Role, Team, User
from training.people.permissions import check_admin
from training.people.users import get_user_by_name

MAX_LISTED_MEMBERS = 50


def create_team(actor: User, name: str) -> Team:
    """Raises NotAllowed: not an admin. Conflict: the name is in use."""
    check_admin(actor, "create teams")
    title = to_one_line(name)[:80]
    if not title:
        raise UserError("The team needs a name.", field="name")
    team, is_new = Team.objects.get_or_create(name=title)
    if not is_new:
        raise Conflict(f"A team named {title} already exists.", field="name")
    return team


def find_visible_teams(user: User) -> Any:
    """The user's teams by name. Admins see all teams."""
    if user.is_superuser:
        return Team.objects.order_by("name")
    # Not `user.teams`: its join would leave only the user of each team's members
    return Team.objects.filter(pk__in=user.memberships.values("team")).order_by("name")


def prefetch_members() -> Prefetch[Any]:
    """The first MAX_LISTED_MEMBERS of each team, as `listed_members`."""
    members = Membership.objects.select_related("user")[:MAX_LISTED_MEMBERS]
    return Prefetch("memberships", queryset=members, to_attr="listed_members")


def find_members(user: User, text: str = "") -> Any:
    """Pairs of ids, by team and name: each member of the user's teams, and None for a team without
    members. The text is part of the name of the team or the member.
    """
    rows = find_visible_teams(user)
    if text:
        rows = rows.filter(Q(name__icontains=text) | Q(memberships__user__username__icontains=text))
    return rows.order_by("name", "memberships__user__username").values_list("pk", "memberships")


def find_managed_team_ids(user: User, team_ids: set[int]) -> set[int]:
    """Those of these teams whose members the user may change."""
    if user.is_superuser:
        return team_ids
    led = user.memberships.filter(role=Role.LEAD, team__in=team_ids)
    return set(led.values_list("team_id", flat=True))


def can_manage_team(user: User, team: Team) -> bool:
    return bool(find_managed_team_ids(user, {team.pk}))


def get_team(user: User, team_id: int) -> Team:
    """Raises NotFound: it does not exist, or the user may not see it."""
    teams = find_visible_teams(user).prefetch_related(prefetch_members())
    team: Team | None = teams.filter(pk=team_id).first()
    if team is None:
        raise NotFound(f"Team {team_id} not found.")
    return team


def set_role(actor: User, team: Team, username: str, role: str) -> Membership:
    """Add a user to a team, or change their role.

    Raises:
        NotAllowed: the actor does not lead the team.
        NotFound: there is no active user of that name.
        Conflict: the team would have no lead.
    """
    check_lead(actor, team)
    if role not in Role.values:
        raise UserError(f"role must be one of {', '.join(Role.values)}.", field="role")
    user = get_user_by_name(username, only_active=True)
    with transaction.atomic():
        if role != Role.LEAD:
            check_not_last_lead(team, user)
        return Membership.objects.update_or_create(user=user, team=team, defaults={"role": role})[0]


def add_member(user: User, team: Team, role: str = Role.MEMBER) -> None:
    """Add a user to a team from the command line. Their new items are shared with it, unless they
    have chosen another team.
    """
    Membership.objects.update_or_create(user=user, team=team, defaults={"role": role})
    if user.default_team is None:
        user.default_team = team
        user.save(update_fields=["default_team"])


def set_sharing_team(user: User, team_id: int | None) -> None:
    """Choose the team that the user's new items are shared with. None keeps them private.

    Raises:
        NotAllowed: the user is neither member nor lead of it.
    """
    memberships = user.memberships.exclude(role=Role.VIEWER)
    if team_id is not None and not memberships.filter(team=team_id).exists():
        raise NotAllowed(
            "New items can be shared only with a team in which you are a member or lead.",
            field="team",
        )
    user.default_team_id = team_id
    user.save(update_fields=["default_team"])


def remove_member(actor: User, team: Team, username: str) -> None:
    """Remove a user from a team. Items that they shared with it stay shared. All users may leave.

    Raises:
        NotAllowed, NotFound, Conflict: see `set_role`.
    """
    if actor.username != username:
        check_lead(actor, team)
    with transaction.atomic():
        membership = team.memberships.filter(user__username=username).select_related("user").first()
        if membership is None:
            raise NotFound(
                f"User {to_one_line(username)[:80]!r} is not in team {team}.", field="username"
            )
        check_not_last_lead(team, membership.user)
        membership.delete()


def check_lead(actor: User, team: Team) -> None:
    if not can_manage_team(actor, team):
        raise NotAllowed(f"Only leads of {team} and admins can change its members.")


def check_not_last_lead(team: Team, user: User) -> None:
    others = team.memberships.exclude(user=user)
    if (
        team.memberships.filter(user=user, role=Role.LEAD).exists()
        and others.exists()
        and not others.filter(role=Role.LEAD).exists()
    ):
        raise Conflict(
            f"{user.username} is the only lead of {team}. Make another member a lead first."
        )
