"""`manage.py demo`: fills an instance with users, teams, data, finished runs and a live one. The
runs are really trained.
"""

from __future__ import annotations

import secrets
import time
from typing import Any

from django.core.management import call_command
from django.core.management.base import BaseCommand, CommandError

from training.catalog.models import BaseModel, ModelState
from training.catalog.services import IMPORT_JOB, add_builtin_model
from training.datasets.examples import add_example
from training.jobs.runner import run_lane
from training.people.models import Team, User
from training.people.teams import add_member
from training.runs.launch.request import LaunchRequest, launch_runs
from training.runs.models import Run
from training.runs.states import UNFINISHED
from training.runs.worker.supervisor import supervise_run

PEOPLE = {"alice": "Voice", "bob": "Voice", "carol": "Tools"}
SHORT_SETTINGS = {
    "max_tokens_per_batch": 512,
    "max_length": 256,
    "eval_steps": 10,
    "save_steps": 10,
    "eval_rows": 20,
}
FINISHED_RUNS: tuple[tuple[str, str, str, dict[str, Any]], ...] = (
    ("alice", "smart_home", "Intents, rank 16", {"rank": 16, "max_steps": 40}),
    ("bob", "smart_home", "Intents, rank 4", {"rank": 4, "alpha": 8, "max_steps": 30}),
    ("carol", "shell_commands", "Shell, one pass", {"max_steps": 30}),
)


class Command(BaseCommand):
    help = (
        "Fill a new instance with demo data. Takes about five minutes on two cores. A running "
        "worker trains the live run."
    )

    def handle(self, *args: Any, **options: Any) -> None:
        call_command("migrate", verbosity=0)
        if User.objects.filter(username__in=PEOPLE).exists():
            raise CommandError(
                "The demo data already exists. Set another SNAPML_HOME for a new instance."
            )
        model = self.import_model()
        people = self.create_people()
        for name, example, title, settings in FINISHED_RUNS:
            self.stdout.write(f"Training: {title}…")
            self.train_run(
                launch_example(people[name], model, example, title, {**SHORT_SETTINGS, **settings})
            )
        live = launch_example(
            people["alice"],
            model,
            "smart_home",
            "Intents, two epochs",
            {"epochs": 2, "max_length": 256},
        )
        self.stdout.write(f"{live.name} is queued. `make run` starts a worker.")

    def import_model(self) -> BaseModel:
        model = add_builtin_model()
        if model is None:
            raise CommandError(
                "The package of the built-in model is not installed. `make run` installs it."
            )
        self.stdout.write("Importing the built-in model…")
        while model.state != ModelState.READY:
            run_lane(IMPORT_JOB.lane)
            model.refresh_from_db()
            if model.state == ModelState.FAILED:
                raise CommandError(model.error)
            time.sleep(0.5)
        return model

    def create_people(self) -> dict[str, User]:
        password = secrets.token_urlsafe(9)
        people = {name: User.objects.create_user(name, password=password) for name in PEOPLE}
        for name, team in PEOPLE.items():
            add_member(people[name], Team.objects.get_or_create(name=team)[0])
        self.stdout.write(f"Password of {', '.join(PEOPLE)}: {password}")
        return people

    def train_run(self, run: Run) -> None:
        """Train the run in this process, unless a worker has started it."""
        while run.state in UNFINISHED:
            supervise_run(run.pk)
            time.sleep(0.5)
            run.refresh_from_db()


def launch_example(
    user: User, model: BaseModel, example: str, title: str, settings: dict[str, Any]
) -> Run:
    data = add_example(user, example)
    request = LaunchRequest(user=user, base_model=model, data=data, settings=settings, name=title)
    run = launch_runs(request, accept_warnings=True)
    assert isinstance(run, Run)
    return run
