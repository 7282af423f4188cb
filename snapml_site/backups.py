"""Backup and restore of all that SnapML stores, and the move from SQLite to another database.

A backup is a folder: `database.sqlite3` or `database.pgdump`, the files of SNAPML_HOME, and
`backup.json`, which is written last. Base models in folders outside SNAPML_HOME are not in it.
"""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from django.apps import apps
from django.conf import settings
from django.core.management import call_command
from django.core.management.color import no_style
from django.db import DatabaseError, connection, connections, models, transaction
from django.db.migrations.recorder import MigrationRecorder

from training.errors import UserError
from training.people.models import User

MANIFEST = "backup.json"
SQLITE_FILE, POSTGRES_FILE = "database.sqlite3", "database.pgdump"
# At the top of SNAPML_HOME: databases and queues, caches, and the files of work under way.
SKIPPED_FOLDERS = {"incoming", "jobs", "memory_estimators"}
ROWS_PER_INSERT = 500


def write_backup(folder: Path) -> None:
    """Write a backup into a new folder; SnapML may be running.

    The database is copied first, in one consistent snapshot, so that every file its rows name is
    copied after it. A run that trains meanwhile resumes from the last checkpoint in the backup.

    Raises:
        UserError: the folder exists, or pg_dump cannot be run.
    """
    folder = folder.resolve()
    home = Path(settings.HOME)
    if folder.exists():
        raise UserError(f"{folder} already exists; name a new folder.")
    if folder.is_relative_to(home):
        raise UserError(f"{folder} is inside {home}; name a folder outside it.")
    folder.mkdir(parents=True)
    if connection.vendor == "sqlite":
        with (
            closing(sqlite3.connect(connection.settings_dict["NAME"])) as source,
            closing(sqlite3.connect(folder / SQLITE_FILE)) as target,
        ):
            source.backup(target)
    else:
        run_postgres("pg_dump", "--format=custom", f"--file={folder / POSTGRES_FILE}")
    copy_files(home, folder / "home")
    manifest = {
        "created": datetime.now(UTC).isoformat(),
        "home": str(home),
        "migrations": get_applied_migrations(),
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))


def restore_backup(folder: Path) -> None:
    """Put a backup into an empty SNAPML_HOME and an empty database. SnapML must not be running.

    Raises:
        UserError: the folder has no complete backup, or the database has users already.
    """
    home = Path(settings.HOME)
    if not (folder / MANIFEST).is_file():
        raise UserError(f"{folder} has no complete backup: {MANIFEST} is missing.")
    manifest = json.loads((folder / MANIFEST).read_text())
    if manifest["home"] != str(home):
        raise UserError(
            f"The backup is of {manifest['home']}, and runs store the paths of their files. "
            f"Set SNAPML_HOME to that folder; it is {home}."
        )
    check_database_empty()
    for path in (folder / "home").iterdir():
        occupied = home / path.name
        if occupied.is_dir() and any(occupied.iterdir()):
            raise UserError(f"{occupied} has files already; restore into an empty SNAPML_HOME.")
    if connection.vendor == "sqlite":
        if not (folder / SQLITE_FILE).is_file():
            raise UserError("The backup is of PostgreSQL; set DATABASE_URL to an empty database.")
        connections.close_all()
        name = Path(connection.settings_dict["NAME"])
        for leftover in name.parent.glob(f"{name.name}-*"):
            leftover.unlink()
        shutil.copy2(folder / SQLITE_FILE, name)
    elif (folder / POSTGRES_FILE).is_file():
        options = ("--clean", "--if-exists", "--no-owner", "--exit-on-error")
        run_postgres("pg_restore", *options, str(folder / POSTGRES_FILE))
    else:
        copy_database(folder / SQLITE_FILE)
    copy_files(folder / "home", home)
    call_command("migrate", verbosity=0)
    check_schema()


def copy_files(source: Path, target: Path) -> None:
    """Copy a SNAPML_HOME. Files that a running SnapML deletes meanwhile are left out."""

    def ignore(folder: str, names: list[str]) -> set[str]:
        if Path(folder) != source:
            return set()
        return {name for name in names if name in SKIPPED_FOLDERS or ".sqlite3" in name}

    def copy(path: str, to: str) -> str:
        try:
            return shutil.copy2(path, to)
        except FileNotFoundError:
            return to

    shutil.copytree(
        source,
        target,
        symlinks=True,
        ignore=ignore,
        copy_function=copy,
        dirs_exist_ok=True,
    )


def run_postgres(program: str, *arguments: str) -> None:
    """Run pg_dump or pg_restore on the configured database. Raises UserError with its message."""
    database = connection.settings_dict
    options = {"HOST": "--host", "PORT": "--port", "USER": "--username"}
    command = [program, "--no-password"]
    command += [f"{option}={database[key]}" for key, option in options.items() if database[key]]
    command += [f"--dbname={database['NAME']}", *arguments]
    environment = os.environ | {"PGPASSWORD": database["PASSWORD"] or ""}
    try:
        subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise UserError(
            f"{program} is not installed; it comes with PostgreSQL's client."
        ) from error
    except subprocess.CalledProcessError as error:
        raise UserError(f"{program} failed: {error.stderr.strip()[-500:]}") from error


def copy_database(path: Path) -> int:
    """Copy every row of a SQLite database of SnapML into the configured, empty database.

    Returns how many rows were copied; all or none are.

    Raises:
        UserError: the file is not a database of this version of SnapML, or the target has users.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist.")
    call_command("migrate", verbosity=0)
    check_database_empty()
    connections.databases["source"] = {**connection.settings_dict, **settings.SQLITE, "NAME": path}
    try:
        if get_applied_migrations("source") != get_applied_migrations():
            raise UserError(
                f"{path} was written by another version of SnapML. Start this version on it once, "
                "which migrates it, then copy it."
            )
        check_schema("source")
        with transaction.atomic():
            tables = list_models()
            clear_tables(tables)
            return sum(copy_table(model) for model in tables)
    except DatabaseError as error:
        raise UserError(f"{path} could not be copied: {error}") from error
    finally:
        connections["source"].close()
        del connections.databases["source"]
        del connections["source"]


def list_models() -> list[type[models.Model]]:
    """Every model with a table of its own."""
    return [
        model
        for model in apps.get_models(include_auto_created=True)
        if model._meta.managed and not model._meta.proxy
    ]


def clear_tables(tables: list[type[models.Model]]) -> None:
    """Delete the rows that `migrate` has created, such as permissions."""
    names = [model._meta.db_table for model in tables]
    with connection.cursor() as cursor:
        for statement in connection.ops.sql_flush(no_style(), names, allow_cascade=True):
            cursor.execute(statement)


def copy_table(model: type[models.Model]) -> int:
    """Copy the rows as they are: `save()` would set dates and call signals."""
    fields = [f for f in model._meta.local_concrete_fields if not f.generated]
    quote = connection.ops.quote_name
    table = quote(model._meta.db_table)
    columns = ", ".join(quote(field.column or "") for field in fields)
    placeholders = ", ".join(["%s"] * len(fields))
    statement = f"INSERT INTO {table} ({columns}) VALUES ({placeholders})"  # noqa: S608
    copied = 0
    with connection.cursor() as cursor:
        for rows in read_rows(model, [field.attname for field in fields]):
            cursor.executemany(
                statement,
                [
                    [f.get_db_prep_save(v, connection) for f, v in zip(fields, row, strict=True)]
                    for row in rows
                ],
            )
            copied += len(rows)
        for statement in connection.ops.sequence_reset_sql(no_style(), [model]):
            cursor.execute(statement)
    return copied


def read_rows(model: type[models.Model], names: list[str]) -> Iterator[list[tuple[Any, ...]]]:
    rows = model._base_manager.using("source").order_by("pk").values_list(*names)
    batch: list[tuple[Any, ...]] = []
    for row in rows.iterator(chunk_size=ROWS_PER_INSERT):
        batch.append(row)
        if len(batch) == ROWS_PER_INSERT:
            yield batch
            batch = []
    if batch:
        yield batch


def get_applied_migrations(alias: str = "default") -> list[list[str]]:
    return sorted(list(key) for key in MigrationRecorder(connections[alias]).applied_migrations())


def check_schema(alias: str = "default") -> None:
    """Raises UserError: a table lacks a column. Databases of development versions do, because their
    migrations have been squashed since.
    """
    with connections[alias].cursor() as cursor:
        for model in list_models():
            table = model._meta.db_table
            described = connections[alias].introspection.get_table_description(cursor, table)
            missing = {field.column or "" for field in model._meta.local_concrete_fields}
            missing -= {column.name for column in described}
            if missing:
                raise UserError(
                    f"The database is of a development version of SnapML: table {table} has no "
                    f"column {min(missing)}. Start with an empty SNAPML_HOME or database."
                )


def check_database_empty() -> None:
    """Raises UserError: the configured database has users already."""
    if User._meta.db_table in connection.introspection.table_names() and User.objects.exists():
        raise UserError("The configured database has data already; name an empty one.")
