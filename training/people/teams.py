"""Who is in a team, and as what. Leads of a team and admins decide; a team is never left without a
lead by accident.
"""

from __future__ import annotations

from django.db import transaction

from training.errors import Conflict, NotAllowed, NotFound, UserError, to_one_line
from training.people.models import Membership, Role, Team, User
from training.people.users import get_user_by_name


def create_team(actor: User, name: str) -> Team:
    """Raises NotAllowed: not an admin; Conflict: the name is taken."""
    if not actor.is_superuser:
        raise NotAllowed("Only admins make teams.")
    title = to_one_line(name)[:80]
    if not title:
        raise UserError("The team needs a name.", field="name")
    team, is_new = Team.objects.get_or_create(name=title)
    if not is_new:
        raise Conflict(f"There is a team {title} already.", field="name")
    return team


def visible_teams(user: User) -> list[Team]:
    """A person's own teams with their members; admins see all."""
    teams = Team.objects.all() if user.is_superuser else user.teams.all()
    return list(teams.order_by("name").prefetch_related("memberships__user"))


def is_lead(user: User, team: Team) -> bool:
    return user.is_superuser or team.memberships.filter(user=user, role=Role.LEAD).exists()


def get_team(user: User, team_id: int) -> Team:
    """Raises NotFound: not there, or not theirs to see."""
    team = next((team for team in visible_teams(user) if team.pk == team_id), None)
    if team is None:
        raise NotFound(f"There is no team {team_id} that you may see.")
    return team


def set_role(actor: User, team: Team, username: str, role: str) -> Membership:
    """Put a person into a team, or change what they are in it.

    Raises:
        NotAllowed: the actor leads it not.
        NotFound: there is nobody of that name.
        Conflict: the last lead would become less.
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
    """What an admin does at the command line: the person is in the team, and shares what they make
    with it from now on.
    """
    Membership.objects.update_or_create(user=user, team=team, defaults={"role": role})
    if user.default_team is None:
        user.default_team = team
        user.save(update_fields=["default_team"])


def set_sharing_team(user: User, team_id: int | None) -> None:
    """Choose the team that new things are shared with; None for nobody.

    Raises:
        NotAllowed: the person is at most a viewer of it.
    """
    memberships = user.memberships.exclude(role=Role.VIEWER)
    if team_id is not None and not memberships.filter(team=team_id).exists():
        raise NotAllowed(
            "You can share new things only with a team of which you are a member or lead.",
            field="team",
        )
    user.default_team_id = team_id
    user.save(update_fields=["default_team"])


def remove_member(actor: User, team: Team, username: str) -> None:
    """Take a person out of a team; what they shared with it stays shared. Everybody may leave.

    Raises:
        NotAllowed, NotFound, Conflict: see `set_role`.
    """
    if actor.username != username:
        check_lead(actor, team)
    with transaction.atomic():
        membership = team.memberships.filter(user__username=username).select_related("user").first()
        if membership is None:
            raise NotFound(f"{to_one_line(username)[:80]!r} is not in {team}.", field="username")
        check_not_last_lead(team, membership.user)
        membership.delete()


def check_lead(actor: User, team: Team) -> None:
    if not is_lead(actor, team):
        raise NotAllowed(f"Only leads of {team} and admins change who is in it.")


def check_not_last_lead(team: Team, user: User) -> None:
    others = team.memberships.exclude(user=user)
    if (
        team.memberships.filter(user=user, role=Role.LEAD).exists()
        and others.exists()
        and not others.filter(role=Role.LEAD).exists()
    ):
        raise Conflict(
            f"{user.username} is the only lead of {team}; make somebody else a lead first."
        )
