"""`manage.py restore FOLDER`: put a backup into an empty SNAPML_HOME and an empty database."""

from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from snapml_site.backups import restore_backup
from snapml_site.management.checked_command import CheckedCommand
from snapml_site.processes import acquire_lock


class Command(CheckedCommand):
    help = "Put a backup into an empty SNAPML_HOME and an empty database. Stop SnapML first."

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("folder", type=Path)

    def handle(self, *args: Any, **options: Any) -> None:
        lock = acquire_lock()
        try:
            restore_backup(options["folder"])
        finally:
            lock.close()
        self.stdout.write("The backup is restored. Start SnapML with `make run`.")
