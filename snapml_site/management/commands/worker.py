"""`manage.py worker`: runs the worker, which supervises runs and works on jobs until it is
stopped.
"""

from typing import Any

from django.conf import settings

from snapml_site.backups import check_migrated
from snapml_site.management.checked_command import CheckedCommand
from training.runs.worker.main import run_worker


class Command(CheckedCommand):
    help = "Supervise runs and work on jobs. `manage.py up` starts one; start more on other hosts."

    def handle(self, *args: Any, **options: Any) -> None:
        check_migrated()
        run_worker(settings.HUEY)
