"""`manage.py worker`: runs the worker, which supervises runs and works on jobs until it is
stopped.
"""

from typing import Any

from django.conf import settings
from django.core.management.base import BaseCommand

from training.runs.worker.main import run_worker


class Command(BaseCommand):
    help = "Supervise runs and work on jobs. `manage.py up` starts one; start more on other hosts."

    def handle(self, *args: Any, **options: Any) -> None:
        run_worker(settings.HUEY)
