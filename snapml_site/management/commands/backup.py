"""`manage.py backup FOLDER`: the database and the files of SNAPML_HOME in a new folder."""

from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from snapml_site.backups import write_backup
from snapml_site.management.checked_command import CheckedCommand


class Command(CheckedCommand):
    help = (
        "Write the database and the files of SNAPML_HOME into a new folder. SnapML may be running."
    )

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("folder", type=Path)

    def handle(self, *args: Any, **options: Any) -> None:
        write_backup(options["folder"])
        self.stdout.write(f"The backup is in {options['folder']}.")
