"""`manage.py copy_database FILE`: move from SQLite to the database that DATABASE_URL names."""

from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from django.core.management.base import BaseCommand, CommandError

from snapml_site.backups import copy_database
from snapml_site.processes import acquire_lock
from training.errors import UserError


class Command(BaseCommand):
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
        except UserError as error:
            raise CommandError(error.message) from error
        finally:
            lock.close()
        self.stdout.write(f"Copied {rows:,} rows.")
