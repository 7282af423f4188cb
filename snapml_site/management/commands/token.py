"""`manage.py token USER`: creates an API token and prints it once."""

from argparse import ArgumentParser
from typing import Any

from django.core.management.base import CommandError

from snapml_site.management.checked_command import CheckedCommand
from training.people.models import User
from training.people.tokens import PasswordNotChanged, create_token


class Command(CheckedCommand):
    help = "Create an API token for a user and print it."

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("user")
        parser.add_argument("--name", default="created in the shell")
        parser.add_argument("--days", type=int, help="days until it expires (default: never)")

    def handle(self, *args: Any, **options: Any) -> None:
        user = User.objects.filter(username=options["user"]).first()
        if user is None:
            known = ", ".join(
                User.objects.order_by("username").values_list("username", flat=True)[:20]
            )
            raise CommandError(f"User {options['user']!r} not found. Users: {known or 'none yet'}.")
        self.stdout.write(create_token(user, options["name"], days=options["days"])[1])
        if user.must_change_password:
            self.stderr.write(PasswordNotChanged(user).message)
