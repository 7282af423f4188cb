"""Teams: membership, roles and their permissions."""

import pytest

from tests.user_errors import raises_user_error
from training.errors import Conflict, NotAllowed, NotFound
from training.people import teams
from training.people.models import Membership, Team

pytestmark = pytest.mark.django_db


@pytest.fixture
def voice(people):
    return Team.objects.get(name="voice")


def test_a_lead_adds_changes_and_removes_members(voice, people):
    lea = people["lea"]
    assert teams.set_role(lea, voice, "mallory", "member").role == "member"
    assert teams.set_role(lea, voice, "mallory", "viewer").role == "viewer"
    teams.remove_member(lea, voice, "mallory")
    assert not Membership.objects.filter(user=people["mallory"], team=voice).exists()


@pytest.mark.parametrize("who", ["alice", "vera", "mallory"])
def test_only_leads_and_admins_change_roles(voice, people, who):
    with pytest.raises(NotAllowed):
        teams.set_role(people[who], voice, who, "lead")


def test_all_members_but_the_last_lead_may_leave(voice, people):
    teams.remove_member(people["bob"], voice, "bob")
    with raises_user_error(Conflict, naming=("lea", "voice")):
        teams.remove_member(people["lea"], voice, "lea")
    with pytest.raises(Conflict):
        teams.set_role(people["lea"], voice, "lea", "member")


def test_unknown_users_and_roles_are_rejected(voice, people):
    with raises_user_error(NotFound, field="username", naming=("zoe",)):
        teams.set_role(people["lea"], voice, "zoe", "member")
    with raises_user_error(field="role", naming=("viewer", "member", "lead")):
        teams.set_role(people["lea"], voice, "bob", "king")


def test_only_admins_create_teams(people):
    with pytest.raises(NotAllowed):
        teams.create_team(people["lea"], "Mine")
    assert teams.create_team(people["admin"], "Mine").name == "Mine"
    with pytest.raises(Conflict):
        teams.create_team(people["admin"], "Mine")


def test_a_viewers_new_items_are_private(people):
    assert people["vera"].get_sharing_team() is None
    assert people["bob"].get_sharing_team().name == "voice"


def test_adding_a_user_to_a_team_does_not_share_their_new_items(people):
    others = Team.objects.get(name="others")
    teams.set_role(people["mallory"], others, "alice", "member")
    people["alice"].refresh_from_db()
    assert people["alice"].get_sharing_team().name == "voice"
    teams.set_sharing_team(people["alice"], others.pk)
    assert people["alice"].get_sharing_team() == others
    with pytest.raises(NotAllowed):
        teams.set_sharing_team(people["vera"], Team.objects.get(name="voice").pk)


def test_a_viewer_cannot_train_on_the_teams_data(people, base_model, data, no_queue):
    from tests.launching import launch_run

    with raises_user_error(NotAllowed, naming=("voice",)):
        launch_run(people["vera"], base_model=base_model, data=data, settings={})


def test_only_a_lead_sees_the_forms_of_the_team(client, people, voice):
    for who, is_allowed in (("lea", True), ("bob", False)):
        client.force_login(people[who])
        assert ("Add to voice" in client.get("/account").content.decode()) is is_allowed
    client.force_login(people["lea"])
    client.post(f"/account/teams/{voice.pk}", {"username": "vera", "role": "member"})
    assert Membership.objects.get(user=people["vera"], team=voice).role == "member"


def test_the_guide_is_shown_until_it_is_dismissed(as_alice):
    assert "Your first run" in as_alice.get("/models").content.decode()
    as_alice.post("/account/guide")
    assert "Your first run" not in as_alice.get("/models").content.decode()


def test_a_lead_sees_all_members_of_the_team_on_the_account_page(client, people):
    client.force_login(people["lea"])
    page = client.get("/account").content.decode()
    assert all(f'value="{name}"' in page for name in ("alice", "bob", "vera", "lea"))
