"""Somebody's name is read the same way at every door."""

import pytest

from training.errors import NotFound, UserError, check_name_typed
from training.people.users import get_user_by_name

pytestmark = pytest.mark.django_db


def test_a_person_is_found_by_their_name_with_or_without_blanks(alice):
    assert get_user_by_name("alice") == get_user_by_name(" alice\n") == alice


def test_a_nul_which_postgresql_refuses_is_a_blank(alice):
    assert get_user_by_name("alice\0") == alice


@pytest.mark.parametrize("name", ["zoe", "", "Alice", "x" * 200])
def test_nobody_of_a_name_is_said_with_the_field(alice, name):
    with pytest.raises(NotFound, match="nobody called") as error_info:
        get_user_by_name(name)
    assert error_info.value.field == "username"


def test_who_has_left_has_limits_but_joins_no_team(alice):
    alice.is_active = False
    alice.save()
    assert get_user_by_name("alice") == alice
    with pytest.raises(NotFound, match="nobody called 'alice'"):
        get_user_by_name("alice", only_active=True)


def test_quotas_of_nobody_read_the_same_on_the_page_and_in_the_api(client, people):
    client.force_login(people["admin"])
    page = client.get("/quotas/people/zoe")
    response = client.get("/api/v1/gpus/people/zoe/quota")
    assert (page.status_code, response.status_code) == (404, 404)
    assert response.json()["error"] == {
        "message": "There is nobody called 'zoe'.",
        "field": "username",
    }
    assert "nobody called" in page.content.decode()


def test_what_is_lost_for_good_is_named_first():
    check_name_typed(" Lights ", "Lights")
    with pytest.raises(UserError, match="Type the name, Lights, to delete it") as error_info:
        check_name_typed("lights", "Lights")
    assert error_info.value.field == "name"
    with pytest.raises(UserError, match="to take it down"):
        check_name_typed("", "halve", "take it down")
