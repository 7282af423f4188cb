"""`manage.py copy_database FILE`: move from SQLite to the database that DATABASE_URL names."""

from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from snapml_site.backups import copy_database
from snapml_site.management.checked_command import CheckedCommand
from snapml_site.processes import acquire_lock


class Command(CheckedCommand):
    help = (
        "Copy every row of a SQLite database of SnapML into the empty database that DATABASE_URL "
        "names. Stop SnapML first."
    )

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("file", type=Path, help="for example var/snapml.sqlite3")

    def handle(self, *args: Any, **options: Any) -> None:
        lock = acquire_lock()
        try:
            rows = copy_database(options["file"])
        finally:
            lock.close()
        self.stdout.write(f"Copied {rows:,} rows.")
