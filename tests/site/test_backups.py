"""Backup, restore, and the move from SQLite to another database, by the commands that
docs/operating.md names.
"""

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import uuid
from contextlib import contextmanager
from urllib.parse import urlsplit, urlunsplit

import pytest

from tests.running_site import ROOT, SETUP_CODE, RunningSite

POSTGRES_URL = os.environ.get("DATABASE_URL", "")


def run_command(site, *arguments, **environment):
    return subprocess.run(
        [sys.executable, "manage.py", *map(str, arguments)],
        cwd=ROOT,
        env={**site.env, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def dump_rows(site, **environment):
    """Every row of every table, as JSON."""
    dump = run_command(site, "dumpdata", "--all", **environment)
    assert dump.returncode == 0, dump.stderr
    rows = json.loads(dump.stdout)
    return sorted(json.dumps(row, sort_keys=True) for row in rows)


def list_files(home):
    return {
        path.relative_to(home): path.read_bytes()
        for path in home.rglob("*")
        if path.is_file() and "sqlite3" not in path.name and path.name != "up.lock"
    }


@pytest.fixture(scope="session")
def prepared_home(tmp_path_factory, tiny_model):
    """A home with a user, a token, a base model and a dataset. Preparing it takes 4 s."""
    home = tmp_path_factory.mktemp("prepared") / "home"
    RunningSite(home, tiny_model).run_python(SETUP_CODE, tiny_model)
    return home


@pytest.fixture
def site(tmp_path, prepared_home, tiny_model):
    """An instance with such a home; nothing runs."""
    shutil.copytree(prepared_home, tmp_path / "home")
    return RunningSite(tmp_path / "home", tiny_model)


@contextmanager
def empty_database(tmp_path):
    """The URL of an empty database: of the PostgreSQL server that DATABASE_URL names, if any."""
    if not POSTGRES_URL.startswith("postgres"):
        yield f"sqlite:///{tmp_path / 'target.sqlite3'}"
        return
    import psycopg

    name = f"snapml_copy_{uuid.uuid4().hex[:12]}"
    with psycopg.connect(POSTGRES_URL, autocommit=True) as server:
        server.execute(f"CREATE DATABASE {name}")
        try:
            yield urlunsplit(urlsplit(POSTGRES_URL)._replace(path=f"/{name}"))
        finally:
            server.execute(f"DROP DATABASE {name} WITH (FORCE)")


def test_a_backup_restores_every_row_and_every_file(site, tmp_path):
    rows, files = dump_rows(site), list_files(site.home)
    assert len(rows) > 50 and any(path.name == "train.jsonl" for path in files)
    assert run_command(site, "backup", tmp_path / "backup").returncode == 0
    shutil.rmtree(site.home)
    restored = run_command(site, "restore", tmp_path / "backup")
    assert restored.returncode == 0, restored.stderr
    assert dump_rows(site) == rows
    assert list_files(site.home) == files


def test_a_restore_never_overwrites_data(site, tmp_path):
    assert run_command(site, "backup", tmp_path / "backup").returncode == 0
    rows = dump_rows(site)
    refused = run_command(site, "restore", tmp_path / "backup")
    assert refused.returncode == 1 and "is in the way" in refused.stderr
    assert dump_rows(site) == rows


def test_a_restore_needs_an_empty_home(site, tmp_path):
    run_command(site, "backup", tmp_path / "backup")
    (site.home / "snapml.sqlite3").unlink()
    refused = run_command(site, "restore", tmp_path / "backup")
    assert refused.returncode == 1 and "/data is in the way" in refused.stderr


def test_a_failed_restore_can_be_repeated(site, tmp_path):
    backup = tmp_path / "backup"
    run_command(site, "backup", backup)
    rows = dump_rows(site)
    content_bytes = (backup / "database.sqlite3").read_bytes()
    (backup / "database.sqlite3").write_bytes(content_bytes[: len(content_bytes) // 2])
    shutil.rmtree(site.home)
    refused = run_command(site, "restore", backup)
    assert refused.returncode == 1 and "is damaged" in refused.stderr
    (backup / "database.sqlite3").write_bytes(content_bytes)
    assert run_command(site, "restore", backup).returncode == 0
    assert dump_rows(site) == rows


def test_a_backup_of_a_newer_version_is_not_restored(site, tmp_path):
    run_command(site, "backup", tmp_path / "backup")
    manifest = tmp_path / "backup" / "backup.json"
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**content, "migrations": [["runs", "0099_future"]]}))
    shutil.rmtree(site.home)
    refused = run_command(site, "restore", tmp_path / "backup")
    assert refused.returncode == 1 and "runs.0099_future" in refused.stderr
    manifest.write_text("{")
    assert "cannot be read" in run_command(site, "restore", tmp_path / "backup").stderr


def test_an_empty_instance_has_nothing_to_back_up(site, tmp_path):
    refused = run_command(site, "backup", tmp_path / "backup", SNAPML_HOME=str(tmp_path / "new"))
    assert refused.returncode == 1 and "nothing to back up" in refused.stderr
    assert not (tmp_path / "backup").exists()


def test_a_backup_follows_folders_on_other_disks_and_skips_sockets(site, tmp_path):
    (site.home / "data").rename(tmp_path / "disk")
    (site.home / "data").symlink_to(tmp_path / "disk")
    os.mkfifo(site.home / "models.fifo")
    assert run_command(site, "backup", tmp_path / "backup").returncode == 0
    assert list((tmp_path / "backup" / "home" / "data").rglob("train.jsonl"))
    assert not (tmp_path / "backup" / "home" / "models.fifo").exists()
    shutil.rmtree(site.home)
    (tmp_path / "new disk").mkdir()
    site.home.mkdir()
    (site.home / "data").symlink_to(tmp_path / "new disk")
    restored = run_command(site, "restore", tmp_path / "backup")
    assert restored.returncode == 0, restored.stderr
    assert (site.home / "data").is_symlink()
    assert list((tmp_path / "new disk").rglob("train.jsonl"))


def test_a_worker_waits_for_up_to_migrate_the_database(site):
    with sqlite3.connect(site.home / "snapml.sqlite3") as database:
        database.execute("DELETE FROM django_migrations WHERE app = 'runs'")
    refused = run_command(site, "worker")
    assert refused.returncode == 1 and "is not migrated" in refused.stderr


def test_a_backup_that_was_not_finished_is_not_restored(site, tmp_path):
    run_command(site, "backup", tmp_path / "backup")
    (tmp_path / "backup" / "backup.json").unlink()
    shutil.rmtree(site.home)
    refused = run_command(site, "restore", tmp_path / "backup")
    assert refused.returncode == 1 and "backup.json is missing" in refused.stderr


def test_a_backup_needs_a_new_folder_outside_the_home(site, tmp_path):
    for folder, reason in ((site.home / "backup", "is inside"), (tmp_path, "already exists")):
        refused = run_command(site, "backup", folder)
        assert refused.returncode == 1 and reason in refused.stderr


def test_a_backup_is_restored_only_into_its_own_home(site, tmp_path):
    run_command(site, "backup", tmp_path / "backup")
    other = str(tmp_path / "other")
    refused = run_command(site, "restore", tmp_path / "backup", SNAPML_HOME=other)
    assert refused.returncode == 1 and str(site.home) in refused.stderr


@pytest.mark.usefixtures("django_db_setup")  # so that the pass with PostgreSQL runs it
def test_the_database_moves_to_another_server_row_by_row(site, tmp_path):
    rows = dump_rows(site)
    with empty_database(tmp_path) as url:
        copied = run_command(site, "copy_database", site.home / "snapml.sqlite3", DATABASE_URL=url)
        assert copied.returncode == 0, copied.stderr
        assert dump_rows(site, DATABASE_URL=url) == rows
        added = run_command(site, "person", "dora", DATABASE_URL=url)  # the next id is free
        assert added.returncode == 0, added.stderr
        again = run_command(site, "copy_database", site.home / "snapml.sqlite3", DATABASE_URL=url)
        assert again.returncode == 1 and "already has data" in again.stderr


DELETE_NEWEST_USER = """
import django
django.setup()
from training.people.models import User
user = User.objects.create_user("deleted")
print(user.pk)
user.delete()
"""


@pytest.mark.usefixtures("django_db_setup")
def test_ids_of_deleted_rows_are_not_used_again_after_a_move(site, tmp_path):
    deleted = int(site.run_python(DELETE_NEWEST_USER))
    with empty_database(tmp_path) as url:
        run_command(site, "copy_database", site.home / "snapml.sqlite3", DATABASE_URL=url)
        run_command(site, "person", "dora", DATABASE_URL=url)
        users = json.loads(run_command(site, "dumpdata", "people.user", DATABASE_URL=url).stdout)
    assert max(user["pk"] for user in users) == deleted + 1


@pytest.mark.usefixtures("django_db_setup")
def test_a_database_of_another_application_is_left_alone(site, tmp_path):
    with empty_database(tmp_path) as url:
        if url.startswith("sqlite"):
            connection = sqlite3.connect(url.removeprefix("sqlite:///"))
        else:
            import psycopg

            connection = psycopg.connect(url)
        connection.execute("CREATE TABLE crm_note (id integer)")
        connection.commit()
        refused = run_command(site, "copy_database", site.home / "snapml.sqlite3", DATABASE_URL=url)
        connection.close()
    assert refused.returncode == 1 and "crm_note" in refused.stderr


def test_a_file_that_is_no_database_is_not_copied(site, tmp_path):
    (tmp_path / "notes.sqlite3").write_text("not a database")
    target = f"sqlite:///{tmp_path / 'target.sqlite3'}"
    for name in ("notes.sqlite3", "missing.sqlite3"):
        refused = run_command(site, "copy_database", tmp_path / name, DATABASE_URL=target)
        assert refused.returncode == 1 and name in refused.stderr
        assert "Traceback" not in refused.stderr


def test_a_database_of_a_development_version_is_named_and_not_started(site):
    with sqlite3.connect(site.home / "snapml.sqlite3") as database:
        database.execute("ALTER TABLE runs_run RENAME COLUMN queue_info TO waits")
    refused = run_command(site, "up")
    assert refused.returncode == 1
    assert "runs_run has no column queue_info" in refused.stderr


@pytest.mark.skipif(not POSTGRES_URL.startswith("postgres"), reason="needs PostgreSQL")
@pytest.mark.usefixtures("django_db_setup")
def test_a_backup_of_postgresql_restores_every_row(site, tmp_path):
    with empty_database(tmp_path) as url:
        moved = run_command(site, "copy_database", site.home / "snapml.sqlite3", DATABASE_URL=url)
        assert moved.returncode == 0, moved.stderr
        rows = dump_rows(site, DATABASE_URL=url)
        written = run_command(site, "backup", tmp_path / "backup", DATABASE_URL=url)
        assert written.returncode == 0, written.stderr
    shutil.rmtree(site.home)
    with empty_database(tmp_path) as url:
        restored = run_command(site, "restore", tmp_path / "backup", DATABASE_URL=url)
        assert restored.returncode == 0, restored.stderr
        assert dump_rows(site, DATABASE_URL=url) == rows
