"""Backup and restore of all that SnapML stores, and the move from SQLite to another database.

A backup is a folder: `database.sqlite3` or `database.pgdump`, the files of SNAPML_HOME in `home`,
and `backup.json`, which is written last. Base models in folders outside SNAPML_HOME are not in it.
"""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import tempfile
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
from django.db.backends.postgresql.client import DatabaseClient
from django.db.migrations.loader import MigrationLoader
from django.db.migrations.recorder import MigrationRecorder
from psycopg.conninfo import make_conninfo

from training.errors import UserError
from training.people.models import User

MANIFEST = "backup.json"
SQLITE_FILE, POSTGRES_FILE = "database.sqlite3", "database.pgdump"
# At the top of SNAPML_HOME: databases and queues, caches, locks and the files of work in progress
SKIPPED_NAMES = {"incoming", "jobs", "memory_estimators", "up.lock"}
# What a SNAPML_HOME has that was only just created
FRESH_NAMES = SKIPPED_NAMES | {"secret_key"}
SQLITE_SUFFIXES = ("", "-wal", "-shm")
ROWS_PER_INSERT = 500


def write_backup(folder: Path) -> None:
    """Write a backup into a new folder. SnapML may be running.

    The database is copied first, in one consistent snapshot, so every file that its rows name is
    copied after it. A run in progress resumes from the newest complete checkpoint in the backup.

    Raises:
        UserError: there is nothing to back up, the folder exists or cannot be created, or pg_dump
            fails.
    """
    folder, home = folder.resolve(), Path(settings.HOME)
    if User._meta.db_table not in connection.introspection.table_names():
        raise UserError(f"There is nothing to back up: the database of {home} is empty.")
    if folder.is_relative_to(home):
        raise UserError(f"{folder} is inside {home}; name a folder outside it.")
    try:
        folder.mkdir(parents=True)
    except FileExistsError as error:
        raise UserError(f"{folder} already exists; name a new folder.") from error
    except OSError as error:
        raise UserError(f"{folder} cannot be created ({error.strerror}).") from error
    try:
        dump_database(folder)
        copy_files(home, folder / "home")
        manifest = {
            "created": datetime.now(UTC).isoformat(),
            "home": str(home),
            "migrations": get_applied_migrations(),
        }
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise UserError(f"The backup could not be written: {error}.") from error
    except UserError:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def dump_database(folder: Path) -> None:
    """Raises UserError: pg_dump fails."""
    if connection.vendor != "sqlite":
        run_postgres("pg_dump", "--format=custom", f"--file={folder / POSTGRES_FILE}")
        return
    with (
        closing(sqlite3.connect(connection.settings_dict["NAME"])) as source,
        closing(sqlite3.connect(folder / SQLITE_FILE)) as target,
    ):
        source.backup(target)
        target.execute("PRAGMA journal_mode=DELETE")  # one file, readable on read-only media


def restore_backup(folder: Path) -> None:
    """Restore a backup into an empty SNAPML_HOME and an empty database. SnapML must be stopped.

    A restore that fails before the database is restored leaves both empty.

    Raises:
        UserError: the folder has no complete backup of this SNAPML_HOME, the backup is of a newer
            version, or SNAPML_HOME or the database is not empty.
    """
    home = Path(settings.HOME)
    check_manifest(read_manifest(folder), home)
    check_home_empty(home)
    check_database_empty()
    with tempfile.TemporaryDirectory(prefix=".restore-", dir=home) as staging:
        copy_files(folder / "home", Path(staging))
        if connection.vendor == "sqlite":
            restore_sqlite(folder / SQLITE_FILE)
        elif (folder / POSTGRES_FILE).is_file():
            options = ("--single-transaction", "--no-owner", "--no-privileges")
            run_postgres("pg_restore", *options, str(folder / POSTGRES_FILE))
        else:
            copy_database(folder / SQLITE_FILE)
        move_files(Path(staging), home)
    call_command("migrate", verbosity=0)
    check_schema()


def read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        return {name: manifest[name] for name in ("home", "migrations")}
    except FileNotFoundError as error:
        raise UserError(f"{folder} has no complete backup: {MANIFEST} is missing.") from error
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{folder / MANIFEST} cannot be read.") from error


def check_manifest(manifest: dict[str, Any], home: Path) -> None:
    """Raises UserError: the backup is of another SNAPML_HOME or of a newer version."""
    if manifest["home"] != str(home):
        raise UserError(
            f"The backup is of {manifest['home']}, but SNAPML_HOME is {home}. Set SNAPML_HOME to "
            "the folder of the backup, because runs store the paths of their files."
        )
    known = list_known_migrations()
    unknown = [key for key in manifest["migrations"] if tuple(key) not in known]
    if unknown:
        raise UserError(
            f"The backup is of a newer version of SnapML (migration {'.'.join(unknown[0])}). "
            "Restore it with that version."
        )


def check_home_empty(home: Path) -> None:
    """Raises UserError: SNAPML_HOME has files of an instance."""
    for path in sorted(home.iterdir()):
        is_fresh = path.name in FRESH_NAMES or path.name.startswith(".restore-")
        if is_fresh or ".sqlite3" in path.name or (path.is_dir() and not any(path.iterdir())):
            continue
        raise UserError(f"{path} is in the way; restore into an empty SNAPML_HOME.")


def check_database_empty() -> None:
    """Raises UserError: the configured database has users, or tables that are not SnapML's."""
    tables = set(connection.introspection.table_names())
    own = {model._meta.db_table for model in list_models()} | {"django_migrations"}
    if tables - own:
        raise UserError(
            f"The database has tables of another application ({min(tables - own)}). Set "
            "DATABASE_URL to an empty database."
        )
    if User._meta.db_table in tables and User.objects.exists():
        raise UserError(
            "The database already has data. Set DATABASE_URL to an empty database, or SNAPML_HOME "
            "to an empty folder."
        )


def restore_sqlite(source: Path) -> None:
    """Raises UserError: the file is missing or damaged."""
    if not source.is_file():
        raise UserError("The backup is of PostgreSQL; set DATABASE_URL to an empty database.")
    try:
        with closing(sqlite3.connect(read_only_uri(source), uri=True)) as database:
            (status,) = database.execute("PRAGMA quick_check(1)").fetchone()
    except sqlite3.DatabaseError as error:
        status = str(error)
    if status != "ok":
        raise UserError(f"{source} is damaged: {status}")
    connections.close_all()
    target = Path(connection.settings_dict["NAME"])
    for suffix in SQLITE_SUFFIXES:
        target.with_name(target.name + suffix).unlink(missing_ok=True)
    shutil.copyfile(source, target)


def copy_files(source: Path, target: Path) -> None:
    """Copy the files of a SNAPML_HOME, whose folders may be links to other disks. Files that a
    running instance deletes in the meantime, links inside the folders, and sockets are left out.
    """
    target.mkdir(parents=True, exist_ok=True)
    skipped = set(SKIPPED_NAMES)
    if connection.vendor == "sqlite":
        name = Path(connection.settings_dict["NAME"]).name
        skipped |= {name + suffix for suffix in SQLITE_SUFFIXES}
    for entry in source.iterdir():
        is_skipped = entry.name in skipped or ".sqlite3" in entry.name
        if is_skipped or entry.name.startswith(".restore-"):
            continue
        if entry.is_file():
            copy_file(entry, target / entry.name)
        elif entry.is_dir():
            for folder, _, names in os.walk(entry, onerror=raise_unless_missing):
                copied = target / Path(folder).relative_to(source)
                copied.mkdir(parents=True, exist_ok=True)
                for name in names:
                    copy_file(Path(folder) / name, copied / name)


def raise_unless_missing(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


def move_files(source: Path, target: Path) -> None:
    """Move the entries of a folder. Folders of the target may be links to other disks."""
    for entry in source.iterdir():
        destination = target / entry.name
        if destination.is_dir():
            move_files(entry, destination)
        else:
            shutil.move(entry, destination)


def copy_file(source: Path, target: Path) -> None:
    if source.is_symlink() or not source.is_file():
        return
    try:
        shutil.copy2(source, target)
    except FileNotFoundError:
        target.unlink(missing_ok=True)


def run_postgres(program: str, *arguments: str) -> None:
    """Run pg_dump or pg_restore on the configured database. Raises UserError with its message."""
    database = connection.settings_dict
    parameters: dict[str, Any] = {
        "dbname": database["NAME"] or None,
        "host": database["HOST"] or None,
        "port": database["PORT"] or None,
        "user": database["USER"] or None,
    }
    command = [program, "--no-password", f"--dbname={make_conninfo(**parameters)}", *arguments]
    # Password, service and TLS options
    _, variables = DatabaseClient.settings_to_cmd_args_env(database, [])
    environment = os.environ | (variables or {})
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
        UserError: the file is not a database of this version of SnapML, or the target is not
            empty.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist.")
    check_database_empty()
    connections.databases["source"] = {
        **connection.settings_dict,
        "ENGINE": settings.SQLITE["ENGINE"],
        "NAME": read_only_uri(path),
        "OPTIONS": {"uri": True, "timeout": 20},
    }
    try:
        check_same_version(path)
        call_command("migrate", verbosity=0)
        with transaction.atomic():
            tables = list_models()
            clear_tables(tables)
            return sum(copy_table(model) for model in tables)
    finally:
        connections["source"].close()
        del connections.databases["source"]
        del connections["source"]


def check_same_version(path: Path) -> None:
    """Raises UserError: the source is not a database of this version of SnapML."""
    try:
        applied = {tuple(key) for key in get_applied_migrations("source")}
        if applied != list_known_migrations():
            raise UserError(
                f"{path} was written by another version of SnapML. Start this version on it once "
                "to migrate it, then copy it."
            )
        check_schema("source")
    except DatabaseError as error:
        raise UserError(f"{path} could not be read: {error}") from error


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
        for statement in connection.ops.sql_flush(no_style(), names):
            cursor.execute(statement)


def copy_table(model: type[models.Model]) -> int:
    """Copy the rows as they are: `save()` would set dates and send signals."""
    fields = [f for f in model._meta.local_concrete_fields if not f.generated]
    quote = connection.ops.quote_name
    table = quote(model._meta.db_table)
    columns = ", ".join(quote(field.column or "") for field in fields)
    placeholders = ", ".join(["%s"] * len(fields))
    statement = f"INSERT INTO {table} ({columns}) VALUES ({placeholders})"  # noqa: S608
    copied = 0
    try:
        with connection.cursor() as cursor:
            for rows in read_rows(model, [field.attname for field in fields]):
                prepared = [
                    [f.get_db_prep_save(v, connection) for f, v in zip(fields, row, strict=True)]
                    for row in rows
                ]
                cursor.executemany(statement, prepared)
                copied += len(rows)
            continue_ids(model)
    except (DatabaseError, ValueError) as error:
        # The first line only: the others may print a row, with its password hash.
        reason = str(error).partition("\n")[0]
        raise UserError(f"Table {model._meta.db_table} could not be copied: {reason}") from error
    return copied


def continue_ids(model: type[models.Model]) -> None:
    """Let new rows have ids after the last one that SQLite has given out, not after the last one
    that still exists: the ledger of device time keeps the ids of deleted runs.
    """
    table, column = model._meta.db_table, model._meta.pk.column
    with connections["source"].cursor() as cursor:
        cursor.execute("SELECT seq FROM sqlite_sequence WHERE name = %s", [table])
        (last_id,) = cursor.fetchone() or (0,)
    if not last_id:
        return
    with connection.cursor() as cursor:
        if connection.vendor == "postgresql":
            cursor.execute(
                "SELECT setval(pg_get_serial_sequence(%s, %s), %s)",
                [connection.ops.quote_name(table), column, last_id],
            )
        else:
            cursor.execute("DELETE FROM sqlite_sequence WHERE name = %s", [table])
            cursor.execute(
                "INSERT INTO sqlite_sequence (name, seq) VALUES (%s, %s)", [table, last_id]
            )


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


def read_only_uri(path: Path) -> str:
    return f"{path.resolve().as_uri()}?mode=ro"


def list_known_migrations() -> set[tuple[str, str]]:
    """The migrations of this version of SnapML and of Django."""
    return set(MigrationLoader(None, ignore_no_migrations=True).disk_migrations)


def get_applied_migrations(alias: str = "default") -> list[list[str]]:
    return sorted(list(key) for key in MigrationRecorder(connections[alias]).applied_migrations())


def check_migrated() -> None:
    """Raises UserError: the database lacks a migration of this version, or is of a development
    version.
    """
    if list_known_migrations() - {tuple(key) for key in get_applied_migrations()}:
        raise UserError(
            "The database is not migrated to this version yet. Start `manage.py up` of this "
            "version first."
        )
    check_schema()


def check_schema(alias: str = "default") -> None:
    """Raises UserError: a table lacks a column, as in a database of a development version, whose
    migrations were squashed since.
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
