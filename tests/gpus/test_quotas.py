"""Who may hand out what, what is refused with a sentence, and what is written down about it."""

import pytest

from training.errors import NotAllowed, UserError
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


def test_it_works(pool, voice, people):
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
def test_only_admins_hand_out(pool, voice, people, username):
    for action in (
        lambda: quotas.edit_quota(people[username], pool, voice, {"limit": 1}),
        lambda: quotas.edit_pool(people[username], pool, {"runs_per_device": 2}),
        lambda: quotas.edit_personal_quota(people[username], people[username], {"max_running": 99}),
        lambda: quotas.set_hold(people[username], pool, is_on_hold=True),
    ):
        with pytest.raises(NotAllowed):
            action()
    assert not AuditEntry.objects.exists()


def test_a_lead_holds_their_own_team_and_lifts_that_but_not_an_admins_hold(pool, voice, people):
    from training.people.models import Team

    def load_quota():
        return quotas.get_quota(pool, voice)

    quotas.set_hold(people["lea"], load_quota(), is_on_hold=True, reason="a demo")
    assert (load_quota().is_on_hold, load_quota().has_admin_hold) == (True, False)
    assert AuditEntry.objects.get().actor_name == "lea"
    quotas.set_hold(people["lea"], load_quota(), is_on_hold=False)
    assert not load_quota().is_on_hold
    quotas.set_hold(people["admin"], load_quota(), is_on_hold=True)
    with pytest.raises(NotAllowed, match="only admins lift"):
        quotas.set_hold(people["lea"], load_quota(), is_on_hold=False)
    quotas.set_hold(people["lea"], load_quota(), is_on_hold=True)
    quotas.set_hold(people["admin"], load_quota(), is_on_hold=False)
    assert not load_quota().is_on_hold
    others = Team.objects.create(name="not hers")
    for target in (quotas.get_quota(pool, others), quotas.get_quota(pool, None)):
        with pytest.raises(NotAllowed):
            quotas.set_hold(people["lea"], target, is_on_hold=True)


@pytest.mark.parametrize(
    ("changes", "message", "field"),
    [
        (
            {"guaranteed": 5},
            "A100 has 4 devices and 0 are guaranteed to others: at most 4 are left.",
            "guaranteed",
        ),
        ({"guaranteed": 2, "limit": 1}, r"The limit \(1\) is below the guarantee \(2\)", "limit"),
        ({"limit": -1}, "limit must be a whole number", "limit"),
        ({"limit": 1.5}, "limit must be a whole number", "limit"),
        ({"weight": 0.0}, "weight must be a number above 0", "weight"),
        ({"weight": float("nan")}, "weight must be a number above 0", "weight"),
        (
            {"hours_per_month": float("inf")},
            "hours_per_month must be a number above 0",
            "hours_per_month",
        ),
        ({"max_run_seconds": True}, "max_run_seconds must be a whole number", "max_run_seconds"),
    ],
)
def test_a_wrong_number_is_refused_with_its_field(pool, voice, people, changes, message, field):
    with pytest.raises(UserError, match=message) as raised:
        quotas.edit_quota(people["admin"], pool, voice, changes)
    assert raised.value.field == field
    assert not Quota.objects.exists()


def test_no_more_is_guaranteed_than_there_is(pool, voice, people):
    others = Team.objects.get(name="others")
    quotas.edit_quota(people["admin"], pool, others, {"guaranteed": 3})
    with pytest.raises(UserError, match="3 are guaranteed to others: at most 1 are left"):
        quotas.edit_quota(people["admin"], pool, voice, {"guaranteed": 2})
    quotas.edit_quota(people["admin"], pool, others, {"guaranteed": 2})
    quotas.edit_quota(people["admin"], pool, voice, {"guaranteed": 2})


def test_an_edit_that_changes_nothing_leaves_no_entry(pool, voice, people):
    quotas.edit_quota(people["admin"], pool, voice, {"limit": 2})
    quotas.edit_quota(people["admin"], pool, voice, {"limit": 2})
    assert AuditEntry.objects.count() == 1


def test_the_audit_log_is_only_added_to_and_a_change_behind_its_back_is_found(pool, voice, people):
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
