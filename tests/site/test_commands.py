import os
import runpy
import shutil
import socket
import subprocess
import sys

import pytest
from django.core.management import CommandError, call_command

from snapml_site.management.commands import up
from tests.running_site import ROOT
from training.people.models import Team, User


def test_make_alone_lists_the_targets():
    listed = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for target in ("run", "test", "lint", "demo", "chaos", "bench", "lock"):
        assert f"make {target} " in listed


def test_a_port_in_use_is_reported_with_the_next_port():
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        with pytest.raises(CommandError, match=f"Port {port} on 127.0.0.1 .*PORT={port + 1}"):
            up.check_port_free("127.0.0.1", port)


def test_a_second_instance_on_the_same_home_is_rejected():
    first = up.acquire_lock()
    with pytest.raises(CommandError, match="already running"):
        up.acquire_lock()
    first.close()
    up.acquire_lock().close()


@pytest.mark.django_db
def test_the_person_command_adds_a_user_with_a_one_time_password_and_a_team(client, capsys):
    call_command("person", "dora", team="Voice")
    password = capsys.readouterr().out.splitlines()[0].rsplit(" ", 1)[1]
    dora = User.objects.get(username="dora")
    assert [team.name for team in dora.teams.all()] == ["Voice"]
    assert not dora.is_superuser
    answer = client.post("/sign-in", {"username": "dora", "password": password}, follow=True)
    assert answer.request["PATH_INFO"] == "/account/password"
    with pytest.raises(CommandError, match="already exists"):
        call_command("person", "dora")


@pytest.mark.django_db
def test_the_person_command_keeps_a_team_that_somebody_creates_meanwhile(monkeypatch):
    def create_meanwhile(_team):
        Team.objects.create(name="Voice", max_disk_bytes=10**9)

    monkeypatch.setattr(Team, "clean_fields", create_meanwhile)
    call_command("person", "dora", team="Voice")
    team = User.objects.get(username="dora").teams.get()
    assert (team.name, team.max_disk_bytes) == ("Voice", 10**9)


STORM = """
import signal, django
django.setup()
from snapml_site.management.commands.up import StopFlag
stopping = StopFlag()
signal.signal(signal.SIGALRM, lambda *_: stopping.set())
signal.setitimer(signal.ITIMER_REAL, 0.01, 0.00002)
for _ in range(20_000):
    stopping.wait(0.001)
signal.setitimer(signal.ITIMER_REAL, 0)
"""


def test_repeated_ctrl_c_does_not_deadlock():
    env = {**os.environ, "DJANGO_SETTINGS_MODULE": "snapml_site.settings"}
    subprocess.run([sys.executable, "-c", STORM], cwd=ROOT, env=env, check=True, timeout=60)


def test_an_empty_home_variable_means_the_default(tmp_path, monkeypatch):
    copy = tmp_path / "snapml" / "snapml_site" / "settings.py"
    copy.parent.mkdir(parents=True)
    shutil.copy(ROOT / "snapml_site" / "settings.py", copy)
    monkeypatch.setenv("SNAPML_HOME", "")
    monkeypatch.chdir(tmp_path)
    assert runpy.run_path(str(copy))["HOME"] == tmp_path / "snapml" / "var"


def test_with_an_external_inference_server_none_is_started(monkeypatch):
    from snapml_site.processes import build_processes

    monkeypatch.setenv("INFERENCE_URL", "http://127.0.0.1:9999")
    assert [child.name for child in build_processes("127.0.0.1", 8000)] == [
        "web",
        "worker",
        "inference",
    ]
    assert [
        child.name for child in build_processes("127.0.0.1", 8000, has_own_inference=False)
    ] == [
        "web",
        "worker",
    ]
