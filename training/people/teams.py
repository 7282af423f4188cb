"""Who is in a team, and as what. Leads of a team and admins decide; a team is never left without a
lead by accident.
"""

from __future__ import annotations

from django.db import transaction

from training.errors import Conflict, NotAllowed, NotFound, UserError, one_line
from training.people.models import Membership, Role, Team, User
from training.people.users import get_person


def create_team(actor: User, name: str) -> Team:
    """Raises NotAllowed: not an admin; Conflict: the name is taken."""
    if not actor.is_superuser:
        raise NotAllowed("Only admins make teams.")
    title = one_line(name)[:80]
    if not title:
        raise UserError("The team needs a name.", field="name")
    team, made = Team.objects.get_or_create(name=title)
    if not made:
        raise Conflict(f"There is a team {title} already.", field="name")
    return team


def visible_teams(user: User) -> list[Team]:
    """A person's own teams with their members; admins see all."""
    teams = Team.objects.all() if user.is_superuser else user.teams.all()
    return list(teams.order_by("name").prefetch_related("memberships__user"))


def leads(user: User, team: Team) -> bool:
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
    refuse_others(actor, team)
    if role not in Role.values:
        raise UserError(f"role must be one of {', '.join(Role.values)}.", field="role")
    user = get_person(username, only_active=True)
    with transaction.atomic():
        if role != Role.LEAD:
            refuse_headless(team, user)
        return Membership.objects.update_or_create(user=user, team=team, defaults={"role": role})[0]


def join(user: User, team: Team, role: str = Role.MEMBER) -> None:
    """What an admin does at the command line: the person is in the team, and shares what they make
    with it from now on.
    """
    Membership.objects.update_or_create(user=user, team=team, defaults={"role": role})
    if user.default_team is None:
        user.default_team = team
        user.save(update_fields=["default_team"])


def share_with(user: User, team_id: int | None) -> None:
    """Choose the team that new things are shared with; None for nobody.

    Raises:
        NotAllowed: the person is at most a viewer of it.
    """
    mine = user.memberships.exclude(role=Role.VIEWER)
    if team_id is not None and not mine.filter(team=team_id).exists():
        raise NotAllowed(
            "You can share new things only with a team of which you are a member or lead.",
            field="team",
        )
    user.default_team_id = team_id
    user.save(update_fields=["default_team"])


def remove(actor: User, team: Team, username: str) -> None:
    """Take a person out of a team; what they shared with it stays shared. Everybody may leave.

    Raises:
        NotAllowed, NotFound, Conflict: see `set_role`.
    """
    if actor.username != username:
        refuse_others(actor, team)
    with transaction.atomic():
        found = team.memberships.filter(user__username=username).select_related("user").first()
        if found is None:
            raise NotFound(f"{one_line(username)[:80]!r} is not in {team}.", field="username")
        refuse_headless(team, found.user)
        found.delete()


def refuse_others(actor: User, team: Team) -> None:
    if not leads(actor, team):
        raise NotAllowed(f"Only leads of {team} and admins change who is in it.")


def refuse_headless(team: Team, user: User) -> None:
    others = team.memberships.exclude(user=user)
    if (
        team.memberships.filter(user=user, role=Role.LEAD).exists()
        and others.exists()
        and not others.filter(role=Role.LEAD).exists()
    ):
        raise Conflict(
            f"{user.username} is the only lead of {team}; make somebody else a lead first."
        )
