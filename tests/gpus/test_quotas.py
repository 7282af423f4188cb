"""Permissions, validation and audit entries of quota edits and holds."""

import pytest

from tests.user_errors import raises_user_error
from training.errors import NotAllowed
from training.gpus import audit, quotas
from training.gpus.devices import DeviceReading, update_devices
from training.gpus.models import AuditEntry, Pool, Quota
from training.people.models import Team

pytestmark = pytest.mark.django_db


@pytest.fixture
def pool(db):
    update_devices(
        [
            DeviceReading(number, f"GPU-{number}", "A100", "A100", 80 * 10**9, 0)
            for number in range(4)
        ]
    )
    return Pool.objects.get()


@pytest.fixture
def voice(people):
    return Team.objects.get(name="voice")


def test_a_quota_edit_is_saved_with_an_audit_entry(pool, voice, people):
    quotas.edit_quota(
        people["admin"],
        pool,
        voice,
        {"guaranteed": 2, "limit": 3, "hours_per_month": 100.0},
        "their project",
    )
    quota = Quota.objects.get()
    assert (quota.guaranteed, quota.limit, quota.hours_per_month, quota.is_hard_budget) == (
        2,
        3,
        100.0,
        False,
    )
    entry = AuditEntry.objects.get()
    assert (entry.actor_name, entry.action, entry.subject, entry.reason) == (
        "root",
        "quota",
        "voice in A100",
        "their project",
    )
    assert entry.before == {"guaranteed": 0, "limit": None, "hours_per_month": None}
    assert entry.after == {"guaranteed": 2, "limit": 3, "hours_per_month": 100.0}


@pytest.mark.parametrize("username", ["alice", "lea", "mallory"])
def test_only_admins_can_edit_quotas_and_pools(pool, voice, people, username):
    for action in (
        lambda: quotas.edit_quota(people[username], pool, voice, {"limit": 1}),
        lambda: quotas.edit_pool(people[username], pool, {"runs_per_device": 2}),
        lambda: quotas.edit_personal_quota(people[username], people[username], {"max_running": 99}),
        lambda: quotas.set_hold(people[username], pool, is_on_hold=True),
    ):
        with pytest.raises(NotAllowed):
            action()
    assert not AuditEntry.objects.exists()


def test_a_lead_can_hold_their_own_team_but_not_lift_the_hold_of_an_admin(pool, voice, people):
    from training.people.models import Team

    def load_quota():
        return quotas.get_quota(pool, voice)

    quotas.set_hold(people["lea"], load_quota(), is_on_hold=True, reason="a demo")
    assert (load_quota().is_on_hold, load_quota().has_admin_hold) == (True, False)
    assert AuditEntry.objects.get().actor_name == "lea"
    quotas.set_hold(people["lea"], load_quota(), is_on_hold=False)
    assert not load_quota().is_on_hold
    quotas.set_hold(people["admin"], load_quota(), is_on_hold=True)
    with raises_user_error(NotAllowed, code="admin_hold", naming=("voice",)):
        quotas.set_hold(people["lea"], load_quota(), is_on_hold=False)
    quotas.set_hold(people["lea"], load_quota(), is_on_hold=True)
    quotas.set_hold(people["admin"], load_quota(), is_on_hold=False)
    assert not load_quota().is_on_hold
    others = Team.objects.create(name="not hers")
    for target in (quotas.get_quota(pool, others), quotas.get_quota(pool, None)):
        with pytest.raises(NotAllowed):
            quotas.set_hold(people["lea"], target, is_on_hold=True)


@pytest.mark.parametrize(
    ("changes", "field", "code", "naming"),
    [
        ({"guaranteed": 5}, "guaranteed", "guaranteed_too_many", ("A100", 4)),
        ({"guaranteed": 2, "limit": 1}, "limit", "limit_below_guarantee", (1, 2)),
        ({"limit": -1}, "limit", "not_an_integer", ("2,147,483,647",)),
        ({"limit": 1.5}, "limit", "not_an_integer", ()),
        ({"weight": 0.0}, "weight", "not_positive", ()),
        ({"weight": float("nan")}, "weight", "not_positive", ()),
        ({"hours_per_month": float("inf")}, "hours_per_month", "not_positive", ()),
        ({"max_run_seconds": True}, "max_run_seconds", "not_an_integer", ()),
    ],
)
def test_an_invalid_value_is_rejected_with_its_field(
    pool, voice, people, changes, field, code, naming
):
    with raises_user_error(code=code, field=field, naming=naming):
        quotas.edit_quota(people["admin"], pool, voice, changes)
    assert not Quota.objects.exists()


def test_no_more_devices_are_guaranteed_than_the_pool_has(pool, voice, people):
    others = Team.objects.get(name="others")
    quotas.edit_quota(people["admin"], pool, others, {"guaranteed": 3})
    with raises_user_error(code="guaranteed_too_many", naming=(4, 3, 1)):
        quotas.edit_quota(people["admin"], pool, voice, {"guaranteed": 2})
    quotas.edit_quota(people["admin"], pool, others, {"guaranteed": 2})
    quotas.edit_quota(people["admin"], pool, voice, {"guaranteed": 2})


def test_an_edit_without_changes_adds_no_audit_entry(pool, voice, people):
    quotas.edit_quota(people["admin"], pool, voice, {"limit": 2})
    quotas.edit_quota(people["admin"], pool, voice, {"limit": 2})
    assert AuditEntry.objects.count() == 1


def test_audit_entries_are_immutable_and_tampering_is_detected(pool, voice, people):
    for limit in (1, 2, 3):
        quotas.edit_quota(people["admin"], pool, voice, {"limit": limit})
    entry = AuditEntry.objects.order_by("pk")[1]
    with pytest.raises(TypeError):
        entry.save()
    with pytest.raises(TypeError):
        entry.delete()
    assert audit.find_tampered_entry() is None
    AuditEntry.objects.filter(pk=entry.pk).update(reason="nothing happened")
    assert audit.find_tampered_entry() == entry
    AuditEntry.objects.filter(pk=entry.pk).update(reason="")
    assert audit.find_tampered_entry() is None
    AuditEntry.objects.filter(pk=entry.pk)._raw_delete("default")
    assert audit.find_tampered_entry() == AuditEntry.objects.order_by("pk")[1]
