"""The forms of the quota pages, the report and the audit log take whatever is typed without
breaking.
"""

import pytest

from training.gpus import audit, quotas
from training.gpus.models import Pool, Quota
from training.gpus.views import escape_formula

pytestmark = pytest.mark.django_db


@pytest.fixture
def as_admin(client, people, device):
    client.force_login(people["admin"])
    return client


@pytest.mark.parametrize(
    ("field", "text"),
    [("memory", "nan"), ("longest", "inf"), ("limit", "1.5"), ("hours", "-3"), ("weight", "")],
)
def test_what_is_no_such_number_is_refused_and_stays_in_the_form(as_admin, field, text):
    form_values = {
        "guaranteed": "0",
        "limit": "1",
        "weight": "1",
        "hours": "",
        "memory": "",
        "longest": "",
        field: text,
        "action": "save",
    }
    response = as_admin.post(f"/quotas/{Pool.objects.get().pk}/0", form_values)
    assert response.status_code == 400
    assert b'role="alert"' in response.content and (
        not text or f'value="{text}"'.encode() in response.content
    )
    assert not Quota.objects.exists()


def test_a_pool_and_a_person_are_edited_and_their_faults_told(as_admin, people):
    pool = Pool.objects.get()
    response = as_admin.post(
        f"/quotas/pools/{pool.pk}",
        {"name": "CPU", "runs_per_device": "9", "shortest": "10", "action": "save"},
    )
    assert response.status_code == 400 and b"runs_per_device is 1 to 4" in response.content
    as_admin.post(
        f"/quotas/pools/{pool.pk}",
        {"name": "Small", "runs_per_device": "2", "shortest": "5", "action": "save"},
    )
    pool.refresh_from_db()
    assert (pool.name, pool.runs_per_device, pool.min_run_seconds) == ("Small", 2, 300)
    as_admin.post(
        "/quotas/people/alice",
        {"max_running": "1", "max_queued": "5", "hours": "10", "is_hard_budget": "on"},
    )
    personal_quota = people["alice"].quota
    assert (
        personal_quota.max_running,
        personal_quota.max_queued,
        personal_quota.hours_per_month,
        personal_quota.is_hard_budget,
    ) == (1, 5, 10.0, True)


def test_an_edit_of_the_numbers_does_not_lift_a_hold(as_admin, people):
    pool = Pool.objects.get()
    quotas.set_hold(people["admin"], pool, is_on_hold=True)
    quotas.edit_pool(people["admin"], pool, {"runs_per_device": 2})
    assert Pool.objects.get().is_on_hold


@pytest.mark.parametrize("month", ["9999-12", "0001-01", "2026-13", "x", "2026-1\0"])
def test_a_month_that_is_none_is_refused(as_admin, month):
    assert as_admin.get("/quotas/report.csv", {"month": month}).status_code == 400
    assert as_admin.get("/api/v1/gpus/usage", {"month": month}).status_code in (400, 422)


@pytest.mark.django_db(transaction=True)  # a download is read in a thread of its own
def test_the_audit_log_is_filtered_and_downloaded(as_admin, people):
    audit.record_entry(people["admin"], "quota", "voice in CPU", reason="=1+1")
    audit.record_entry(None, "admitted", "run 7")
    assert b"run 7" not in as_admin.get("/audit?action=quota").content
    assert b"run 7" in as_admin.get("/audit?q=run+7%00").content
    text = read_stream(as_admin.get("/audit.csv?action=quota"))
    assert "voice in CPU" in text and "'=1+1" in text and "run 7" not in text
    assert b"none is missing" in as_admin.get("/audit?check=1").content


def read_stream(response):
    import asyncio

    async def gather():
        return b"".join([piece async for piece in response.streaming_content])

    return asyncio.run(gather()).decode()


def test_a_cell_is_never_a_formula():
    assert [escape_formula(cell) for cell in ("=1", "+1", "-1", "@x", "ok", 5)] == [
        "'=1",
        "'+1",
        "'-1",
        "'@x",
        "ok",
        5,
    ]
