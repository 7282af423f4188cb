"""`manage.py worker`: runs the worker, which supervises runs and works on jobs until it is
stopped.
"""

from typing import Any

from django.conf import settings
from django.core.management.base import BaseCommand, CommandError

from snapml_site.backups import check_migrated
from training.errors import UserError
from training.runs.worker.main import run_worker


class Command(BaseCommand):
    help = "Supervise runs and work on jobs. `manage.py up` starts one; start more on other hosts."

    def handle(self, *args: Any, **options: Any) -> None:
        try:
            check_migrated()
        except UserError as error:
            raise CommandError(error.message) from error
        run_worker(settings.HUEY)
