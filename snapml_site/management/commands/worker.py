"""`manage.py worker`: watches runs and imports models until it is told to end."""

from typing import Any

from django.conf import settings
from django.core.management.base import BaseCommand

from training.runs.worker.main import run_worker


class Command(BaseCommand):
    help = (
        "Watch runs and import models. `manage.py up` starts it; on a second host start it by hand."
    )

    def handle(self, *args: Any, **options: Any) -> None:
        run_worker(settings.HUEY)
