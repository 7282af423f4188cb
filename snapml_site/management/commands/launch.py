"""`manage.py launch FILE --user NAME`: starts the run or sweep that a YAML file describes."""

from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from django.core.management.base import CommandError

from snapml_site.management.checked_command import CheckedCommand
from training.auto.plan_types import Plan
from training.errors import UserError
from training.formatting import format_setting
from training.people.models import User
from training.runs.launch import yaml_file
from training.runs.launch.request import LaunchPreview, launch_runs, preview_launch
from training.runs.launch.services import WarningsNotAccepted
from training.runs.models import Run, Sweep


class Command(CheckedCommand):
    help = "Start the run that a YAML file describes. Settings with several values start a sweep."

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("file", type=Path)
        parser.add_argument("--user", required=True, help="owner of the run")
        parser.add_argument("--accept-warnings", action="store_true", help="start despite warnings")
        parser.add_argument(
            "--again",
            action="store_true",
            help="plan again with Auto, or start the whole sweep again, as in the file's `request`",
        )
        parser.add_argument(
            "--forecast", action="store_true", help="print the forecast without starting anything"
        )

    def handle(self, *args: Any, **options: Any) -> None:
        user = User.objects.filter(username=options["user"], is_active=True).first()
        if user is None:
            raise CommandError(f"User {options['user']} not found. `manage.py person` adds users.")
        try:
            text = options["file"].read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CommandError(f"{options['file']} cannot be read: {error}") from error
        try:
            self.start_request(user, text, options)
        except WarningsNotAccepted as error:
            raise CommandError(
                "\n".join([*error.warnings, "To start anyway, add --accept-warnings"])
            ) from error
        except UserError as error:
            raise CommandError(f"{options['file']}: {error.message}") from error

    def start_request(self, user: User, text: str, options: dict[str, Any]) -> None:
        request = yaml_file.to_launch_request(
            user, yaml_file.read_yaml(text), again=options["again"]
        )
        if options["forecast"]:
            self.show_preview(preview_launch(request))
            return
        launched = launch_runs(request, accept_warnings=options["accept_warnings"])
        if isinstance(launched, Sweep):
            count = launched.runs.count()
            self.stdout.write(f"Sweep {launched.pk}, {launched.name}: {count} runs queued.")
            return
        if launched.auto_plan:
            self.show_choices(launched)
        self.stdout.write(f"Run {launched.pk}, {launched.name}, is queued.")

    def show_choices(self, run: Run) -> None:
        for choice in run.auto_plan["choices"]:
            self.stdout.write(
                f"{choice['setting']} = {format_setting(choice['value'])}: {choice['why']}"
            )

    def show_preview(self, launch_preview: LaunchPreview) -> None:
        if launch_preview.plan:
            self.show_plan(launch_preview.plan)
        forecast = launch_preview.forecast
        self.stdout.write(f"runs: {launch_preview.runs}")
        self.stdout.write(f"steps: {forecast.get('steps', 'not counted yet')}")
        memory = forecast["memory"]
        self.stdout.write(f"memory: {memory['peak'] if memory else 'not simulated yet'}")
        self.stdout.writelines(f"warning: {warning}\n" for warning in forecast["warnings"])

    def show_plan(self, plan: Plan) -> None:
        for choice in plan.choices:
            self.stdout.write(f"{choice.setting} = {format_setting(choice.value)}: {choice.why}")
