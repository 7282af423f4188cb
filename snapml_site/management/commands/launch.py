"""`manage.py launch FILE --user NAME`: start the run (or the sweep) that a YAML file describes."""

from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from django.core.management.base import BaseCommand, CommandError

from training.errors import UserError
from training.formatting import format_setting
from training.people.models import User
from training.runs.launch import auto as launch_auto
from training.runs.launch import services, sweep, yaml_file


class Command(BaseCommand):
    help = "Start the run that a YAML file describes; settings with several values start a sweep."

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("file", type=Path)
        parser.add_argument("--user", required=True, help="whose run it is")
        parser.add_argument(
            "--accept-warnings", action="store_true", help="start although something is unwise"
        )

    def handle(self, *args: Any, **options: Any) -> None:
        user = User.objects.filter(username=options["user"], is_active=True).first()
        if user is None:
            raise CommandError(
                f"There is nobody called {options['user']}; `manage.py person` adds people."
            )
        try:
            text = options["file"].read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CommandError(f"{options['file']} cannot be read: {error}") from error
        try:
            self.start(user, yaml_file.read_yaml(text), accept=options["accept_warnings"])
        except UserError as error:
            raise CommandError(f"{options['file']}: {error.message}") from error

    def start(self, user: User, described: dict[str, Any], *, accept: bool) -> None:
        asked: dict[str, Any] = {
            "base_model": yaml_file.find_model(described),
            "data": yaml_file.find_data(user, described),
        }
        said: dict[str, Any] = {
            **asked,
            "name": described["name"],
            "where": yaml_file.find_where(described),
        }
        auto = described.get("auto")
        plan = None
        if auto is not None:
            locked = {
                key: yaml_file.numeric(value) for key, value in (auto.get("locked") or {}).items()
            }
            plan = launch_auto.plan_now(
                *asked.values(), goal=str(auto.get("goal") or "task"), locked=locked
            )
        settings = plan.settings if plan else described["settings"]
        warnings = sweep.warnings_of(sweep.members(settings), asked["base_model"], asked["data"])
        if warnings and not accept:
            raise CommandError("\n".join([*warnings, "To start anyway: --accept-warnings"]))
        if plan:
            run = launch_auto.launch_planned(user, plan, **said)
            self.stdout.write(
                "\n".join(
                    f"{one.setting} = {format_setting(one.value)}: {one.why}"
                    for one in plan.choices
                )
            )
            self.stdout.write(f"Run {run.pk}, {run.name}, is waiting for a worker.")
        elif sweep.split_grid(settings)[1]:
            made = sweep.launch_sweep(user, **said, settings=settings)
            self.stdout.write(
                f"Sweep {made.pk}, {made.name}: {made.runs.count()} runs are waiting."
            )
        else:
            run = services.launch_run(user, **said, settings=sweep.split_grid(settings)[0])
            self.stdout.write(f"Run {run.pk}, {run.name}, is waiting for a worker.")
