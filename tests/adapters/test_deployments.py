"""Deployments: serving versions, switching, traffic shares, rollbacks, history and usage."""

import pytest

from adapters.export import merge
from adapters.models import AdapterVersion, Deployment, UsageCounter
from adapters.serving import inference_client, services, usage
from adapters.serving.services import Routing
from tests.registry import register_version
from tests.user_errors import raises_user_error
from training.errors import Conflict, NotAllowed, NotFound
from training.jobs.models import Job, JobState

pytestmark = pytest.mark.django_db


@pytest.fixture
def versions(run):
    return [register_version(run, number=number) for number in (1, 2, 3)]


@pytest.fixture
def deployed(alice, versions):
    return services.create_deployment(alice, "lights", Routing(versions[0]))


def test_the_adapter_is_served_attached_until_the_merge_is_done(alice, versions, deployed):
    assert services.pick_version(deployed) == versions[0]
    location = inference_client.get_model_location(versions[0], use_merged=True)
    assert location["adapter"] == str(versions[0].folder)
    versions[0].merged_folder.mkdir(parents=True, exist_ok=True)
    Job.objects.filter(kind=merge.KIND, key=str(versions[0].pk)).update(state=JobState.DONE)
    merged = {
        "base": str(versions[0].merged_folder),
        "base_sha256": "a",
        "lora": str(versions[0].folder),
    }
    assert inference_client.get_model_location(versions[0], use_merged=True) == merged
    assert inference_client.get_model_location(versions[0], use_merged=False)["adapter"]
    versions[0].merged_folder.rmdir()


def test_a_rollback_undoes_a_switch_and_both_are_in_the_history(alice, versions, deployed):
    services.switch_deployment(alice, deployed, Routing(versions[1]))
    services.switch_deployment(alice, deployed, Routing(versions[2], use_merged=False))
    now = services.roll_back(alice, deployed)
    assert (now.version, now.use_merged) == (versions[1], True)
    again = services.roll_back(alice, now)
    assert (again.version, again.use_merged) == (versions[2], False)
    description = list(deployed.changes.values_list("description", flat=True))
    assert description == [
        "Rolled back to Lights v3.",
        "Rolled back to Lights v2.",
        "Switched to Lights v3.",
        "Switched to Lights v2.",
        "Deployed Lights v1.",
    ]


def test_there_is_no_rollback_without_a_previous_version(alice, versions, deployed):
    with raises_user_error(Conflict, code="no_other_version"):
        services.roll_back(alice, deployed)
    services.switch_deployment(alice, deployed, Routing(versions[1]))
    versions[0].delete()
    with raises_user_error(Conflict, code="no_other_version"):
        services.roll_back(alice, deployed)


def test_two_versions_share_the_traffic_by_percentage(alice, versions, deployed):
    now = services.switch_deployment(alice, deployed, Routing(versions[0], versions[1], 25))
    picks = [services.pick_version(now) for _ in range(2000)]
    assert 400 < picks.count(versions[1]) < 600


@pytest.mark.parametrize(
    ("change", "field", "code"),
    [
        ({"canary": None, "canary_percent": 20}, "canary", "no_canary"),
        ({"canary": 1, "canary_percent": 0}, "canary_percent", ""),
        ({"canary": 1, "canary_percent": 100}, "canary_percent", ""),
        ({"canary": 0, "canary_percent": 50}, "canary", "same_version"),
    ],
)
def test_an_invalid_traffic_share_is_rejected(alice, versions, deployed, change, field, code):
    canary = None if change["canary"] is None else versions[change["canary"]]
    with raises_user_error(field=field, code=code):
        services.switch_deployment(
            alice, deployed, Routing(versions[0], canary, change["canary_percent"])
        )


@pytest.mark.parametrize("name", ["", "Lights", "-a", "a-", "a b", "../x", "a" * 64, "é", "a/b"])
def test_a_name_that_does_not_fit_into_a_url_is_rejected(alice, versions, name):
    with raises_user_error(field="name"):
        services.create_deployment(alice, name, Routing(versions[0]))


def test_users_cannot_take_over_a_name_or_deploy_versions_they_cannot_see(
    people, versions, deployed
):
    mallory = people["mallory"]
    with pytest.raises(NotFound):
        services.create_deployment(mallory, "mine", Routing(versions[0]))
    own = AdapterVersion.objects.create(
        owner=mallory,
        name="x",
        number=1,
        base_model=versions[0].base_model,
        method="lora",
        step=1,
        sha256="m",
        size_bytes=1,
        files={},
    )
    with raises_user_error(Conflict, field="name", naming=("lights",)):
        services.create_deployment(mallory, "lights", Routing(own))
    with pytest.raises(NotAllowed):
        services.switch_deployment(mallory, deployed, Routing(own))
    assert Deployment.objects.get().version == versions[0]


def test_a_team_deployment_cannot_switch_to_a_version_outside_the_team(
    people, alice, data, versions, deployed
):
    team = people["alice"].teams.get()
    Deployment.objects.update(team=team)
    AdapterVersion.objects.update(team=None)
    deployed.refresh_from_db()
    versions[1].refresh_from_db()
    with raises_user_error(Conflict, field="version", naming=("voice",)):
        services.switch_deployment(alice, deployed, Routing(versions[1]))


def test_a_viewer_of_the_team_cannot_deploy(people, versions):
    AdapterVersion.objects.update(team=people["alice"].teams.get())
    with raises_user_error(NotAllowed):
        services.create_deployment(people["vera"], "views", Routing(versions[0]))
    assert services.create_deployment(people["bob"], "bobs", Routing(versions[0])).team is not None


def test_deleting_a_deployment_needs_its_name(alice, versions, deployed):
    with raises_user_error(field="name", naming=("lights",)):
        services.delete_deployment(alice, deployed, "light")
    services.delete_deployment(alice, deployed, "lights")
    assert not Deployment.objects.exists()


def test_requests_are_counted_by_version_and_summarized_as_rates(versions, deployed):
    for seconds in (1.0, 1.0, 3.0):
        record = usage.RequestRecord(
            deployment_id=deployed.pk,
            version_id=versions[0].pk,
            seconds=seconds,
            first_token_seconds=0.5,
            completion_tokens=10,
        )
        usage.log_request(record)
    usage.log_request(
        usage.RequestRecord(
            deployment_id=deployed.pk, version_id=versions[1].pk, seconds=9.0, failed=True
        )
    )
    rates = usage.get_rates(deployed)
    assert (
        rates["requests"],
        rates["failures"],
        rates["median_seconds"],
        rates["first_token_seconds"],
    ) == (
        4,
        1,
        1.0,
        0.5,
    )
    assert rates["tokens_per_second"] == pytest.approx(6.0)
    assert list(UsageCounter.objects.order_by("version_id").values_list("answers", "failures")) == [
        (3, 0),
        (0, 1),
    ]
    assert sorted(row["answers"] for row in usage.get_usage_by_minute(deployed)) == [0, 3]


def test_a_request_that_ends_after_its_deployment_was_deleted_is_not_logged(
    alice, versions, deployed
):
    deployment_id = deployed.pk
    services.delete_deployment(alice, deployed, "lights")
    usage.log_request(
        usage.RequestRecord(deployment_id=deployment_id, version_id=versions[0].pk, seconds=1.0)
    )
    assert not UsageCounter.objects.exists()
