"""Users are looked up by name in the same way everywhere."""

import pytest

from training.errors import NotFound, UserError, check_name_typed
from training.people.users import get_user_by_name

pytestmark = pytest.mark.django_db


def test_spaces_around_a_user_name_are_ignored(alice):
    assert get_user_by_name("alice") == get_user_by_name(" alice\n") == alice


def test_a_nul_character_counts_as_a_space(alice):
    assert get_user_by_name("alice\0") == alice


@pytest.mark.parametrize("name", ["zoe", "", "Alice", "x" * 200])
def test_an_unknown_name_is_not_found_with_its_field(alice, name):
    with pytest.raises(NotFound, match="not found") as error_info:
        get_user_by_name(name)
    assert error_info.value.field == "username"


def test_an_inactive_user_is_found_unless_only_active(alice):
    alice.is_active = False
    alice.save()
    assert get_user_by_name("alice") == alice
    with pytest.raises(NotFound, match="'alice' not found"):
        get_user_by_name("alice", only_active=True)


def test_the_quota_of_an_unknown_user_is_a_404_on_page_and_api(client, people):
    client.force_login(people["admin"])
    page = client.get("/quotas/people/zoe")
    response = client.get("/api/v1/gpus/people/zoe/quota")
    assert (page.status_code, response.status_code) == (404, 404)
    assert response.json()["error"] == {
        "message": "User 'zoe' not found.",
        "field": "username",
    }
    assert "not found" in page.content.decode()


def test_deleting_requires_the_name_to_be_typed():
    check_name_typed(" Lights ", "Lights")
    with pytest.raises(UserError, match="Type the name Lights to delete it") as error_info:
        check_name_typed("lights", "Lights")
    assert error_info.value.field == "name"
