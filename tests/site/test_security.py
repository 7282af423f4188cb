"""Items of the attack checklist that concern the whole site."""

import json
import os
import pickle
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from django.conf import settings as django_settings
from huey import SqliteHuey

from snapml_site import checks
from tests import tiny
from training.child_process import child_environment
from training.runs.worker.engine_process import EngineProcess


def test_the_engine_gets_no_secrets_in_its_environment(tmp_path, monkeypatch):
    for name in (
        "SECRET_KEY",
        "DATABASE_URL",
        "REDIS_URL",
        "INFERENCE_TOKEN",
        "HF_TOKEN",
        "AWS_SECRET_ACCESS_KEY",
    ):
        monkeypatch.setenv(name, "very-secret")
    stub = tmp_path / "python"
    stub.write_text(
        f"#!{sys.executable}\nimport json, os\njson.dump(dict(os.environ), "
        f"open({str(tmp_path / 'env.json')!r}, 'w'))\n"
    )
    stub.chmod(0o700)
    monkeypatch.setattr("training.runs.worker.engine_process.sys.executable", str(stub))
    engine = EngineProcess(tmp_path)
    engine.start_process({})
    engine._child.wait(20)
    environment = json.loads((tmp_path / "env.json").read_text())
    assert "PATH" in environment
    assert "very-secret" not in environment.values()
    assert child_environment("HF_TOKEN")["HF_TOKEN"] == "very-secret"


def test_a_folder_name_is_never_run_as_a_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "$(touch x); touch y"
    folder.mkdir()
    engine = EngineProcess(folder)
    engine.start_process({})
    engine._child.wait(60)
    assert not (tmp_path / "x").exists()
    assert not (tmp_path / "y").exists()


class Canary:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_forged_queue_message_is_not_unpickled(tmp_path):
    options = django_settings.HUEY_OPTIONS
    huey = SqliteHuey("snapml", filename=str(tmp_path / "queue"), **options)
    canary = tmp_path / "canary"
    with sqlite3.connect(tmp_path / "queue") as queue:
        queue.execute(
            "insert into task (queue, data, priority) values ('snapml', ?, 0)",
            [pickle.dumps(Canary(str(canary)))],
        )
    with pytest.raises(ValueError):
        huey.dequeue()
    assert not canary.exists()


@pytest.mark.django_db
@pytest.mark.parametrize(
    "path", ["/sign-in", "/", "/models", "/nothing", "/api/v1/runs", "/status-bar"]
)
def test_every_response_has_the_security_headers(as_alice, path):
    answer = as_alice.get(path)
    policy = answer["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe-eval" not in policy
    assert not any(
        "unsafe-inline" in part for part in policy.split(";") if "style-src-attr" not in part
    )
    assert answer["X-Frame-Options"] == "DENY"
    assert answer["X-Content-Type-Options"] == "nosniff"


def test_versions_with_known_vulnerabilities_fail_the_system_check(monkeypatch):
    assert checks.check_versions() == []
    monkeypatch.setattr(checks, "version", lambda _name: "0.1")
    assert {error.id for error in checks.check_versions()} == {"snapml.E001"}
    assert len(checks.check_versions()) == len(checks.MIN_VERSIONS)


def test_redis_without_postgres_raises_a_warning(settings):
    settings.REDIS_URL, settings.DATABASE_URL = "redis://x", ""
    assert [warning.id for warning in checks.check_single_host()] == ["snapml.W001"]


def test_debug_is_off_and_files_are_readable_by_their_owner_only(tmp_path):
    assert django_settings.DEBUG is False
    assert django_settings.HUEY.immediate is False
    home = tmp_path / "home"
    home.mkdir(mode=0o755)
    env = {**os.environ, "SNAPML_HOME": str(home), "DJANGO_SETTINGS_MODULE": "snapml_site.settings"}
    env.pop("DATABASE_URL", None)
    code = (
        "import django; django.setup(); from django.core.management import call_command; "
        "call_command('migrate', verbosity=0)"
    )
    subprocess.run([sys.executable, "-c", code], env=env, check=True, cwd=Path(__file__).parents[2])
    assert home.stat().st_mode & 0o077 == 0
    assert all(path.stat().st_mode & 0o077 == 0 for path in home.iterdir())


@pytest.mark.django_db
def test_list_pages_need_a_constant_number_of_queries(
    as_alice, run, monkeypatch, django_assert_max_num_queries
):
    from adapters.serving.services import Routing, create_deployment
    from tests.registry import register_version
    from training.runs.forecast import token_lengths
    from training.runs.models import Run

    monkeypatch.setattr(
        token_lengths,
        "get_cached_lengths",
        lambda *_args, **_more: tiny.make_token_lengths(run.data.train_rows),
    )
    for _ in range(30):
        copy = Run.objects.get(pk=run.pk)
        copy.pk = None
        copy.save()
    for number in range(30):
        create_deployment(
            run.owner,
            f"lamps-{number}",
            Routing(register_version(run, number=number), use_merged=False),
        )
    for path in (
        "/",
        "/data",
        "/adapters",
        "/deployments",
        "/disk",
        "/models",
        "/runs/new",
        "/gpus",
    ):
        with django_assert_max_num_queries(30):
            assert as_alice.get(path).status_code == 200


def test_the_tests_use_their_own_home():
    assert Path(django_settings.HOME).name.startswith("snapml-test-")
