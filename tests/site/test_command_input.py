"""Management commands answer any argument and file with one sentence, never with a traceback."""

import errno
import os

import pytest
from django.core.management import CommandError, call_command

from training.people.models import Team, User

pytestmark = pytest.mark.django_db
NOT_UTF_8 = os.fsdecode(b"a\xff")
NAMES = [NOT_UTF_8, "a\0b", "", "x" * 300]


@pytest.mark.parametrize("name", NAMES)
def test_the_person_command_refuses_a_name_that_no_user_can_have(name):
    with pytest.raises(CommandError):
        call_command("person", name)
    assert not User.objects.filter(username=name[:1]).exists()


@pytest.mark.parametrize("team", [NOT_UTF_8, "a\0b", "x" * 81])
def test_the_person_command_refuses_a_team_before_it_adds_the_user(team):
    with pytest.raises(CommandError):
        call_command("person", "dora", team=team)
    assert not User.objects.filter(username="dora").exists()
    assert not Team.objects.exists()


@pytest.mark.parametrize("name", NAMES)
def test_the_other_commands_refuse_a_user_or_file_that_does_not_exist(tmp_path, name):
    with pytest.raises(CommandError):
        call_command("token", name)
    with pytest.raises(CommandError):
        call_command("launch", str(tmp_path / "none.yaml"), user=name)
    for command in ("forecast", "restore"):
        with pytest.raises(CommandError):
            call_command(command, str(tmp_path / name))


@pytest.mark.parametrize("text", [b"null", b"[]", b"5", b'"x"', b"", b"\xff", b"{}", b"[" * 900])
def test_the_forecast_command_refuses_a_file_that_is_no_config(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(CommandError):
        call_command("forecast", str(tmp_path), method="lora")


def test_a_command_on_a_full_disk_says_so(monkeypatch, tmp_path):
    def fail(*_args):
        raise OSError(errno.ENOSPC, "No space left on device", "/x")

    monkeypatch.setattr("snapml_site.management.commands.backup.write_backup", fail)
    with pytest.raises(CommandError, match="disk is full"):
        call_command("backup", str(tmp_path / "copy"))
