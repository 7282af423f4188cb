"""`manage.py person NAME`: adds a user with a one-time password, printed once. `--team` adds a new
or existing user to a team.
"""

import secrets
from argparse import ArgumentParser
from typing import Any

from django.core.management.base import CommandError

from snapml_site.management.checked_command import CheckedCommand
from training.people.models import Team, User
from training.people.teams import add_member


class Command(CheckedCommand):
    help = "Add a user, or add an existing user to a team."

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("name")
        parser.add_argument("--team", default="", help="created if it does not exist")
        parser.add_argument(
            "--admin", action="store_true", help="can add models and see everything"
        )

    def handle(self, *args: Any, **options: Any) -> None:
        name, team_name = options["name"], options["team"]
        user = User.objects.filter(username=name).first()
        if user is not None and not team_name:
            raise CommandError(f"User {name} already exists. --team TEAM adds them to a team.")
        if team_name:
            Team(name=team_name).clean_fields()  # before the user is added
        if user is None:
            password = secrets.token_urlsafe(9)
            user = User(
                username=name,
                must_change_password=True,
                is_superuser=options["admin"],
                is_staff=options["admin"],
            )
            user.full_clean(exclude=["password"])
            user.set_password(password)
            user.save()
            self.stdout.write(f"{name} signs in with the one-time password {password}")
        if team_name:
            team, _ = Team.objects.get_or_create(name=team_name)
            add_member(user, team)
            self.stdout.write(f"{name} is in team {team_name}.")
