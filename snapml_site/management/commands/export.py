"""`manage.py export RUN --to tensorboard|mlflow|wandb TARGET`: exports a run's metrics to another
tracker.
"""

from argparse import ArgumentParser
from typing import Any

from django.core.management.base import CommandError

from snapml_site.management.checked_command import CheckedCommand
from training.runs.metrics.trackers import EXPORTS
from training.runs.models import Run


class Command(CheckedCommand):
    help = (
        "Export a run's metrics to TensorBoard (a folder), MLflow (a tracking URI) or "
        "Weights & Biases (a project)."
    )

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("run", type=int, help="the run's number, as in its URL")
        parser.add_argument("target", help="folder, tracking URI, or project")
        parser.add_argument("--to", required=True, choices=sorted(EXPORTS))

    def handle(self, *args: Any, **options: Any) -> None:
        run = (
            Run.objects.select_related("base_model", "data__dataset")
            .filter(pk=options["run"])
            .first()
        )
        if run is None:
            raise CommandError(f"Run {options['run']} not found.")
        destination = EXPORTS[options["to"]](run, options["target"])
        self.stdout.write(f"{run.name} was exported to {destination}.")
