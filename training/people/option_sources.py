"""Options of selects: teams."""

from typing import Any

from training.people.models import Team, User
from training.people.options import Option, OptionSource
from training.people.teams import find_visible_teams


def find_teams(user: User, text: str) -> Any:
    return find_visible_teams(user).filter(name__icontains=text)


def to_sharing_option(team: Team) -> Option:
    return Option(str(team.pk), f"shared with {team}")


SHARING_TEAMS = OptionSource("sharing-teams", find_teams, to_sharing_option)
