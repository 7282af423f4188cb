"""The quota pages, the usage report and the audit log accept any input without breaking."""

import pytest

from tests.user_errors import assert_mentions
from training.gpus import audit, quotas
from training.gpus.audit_views import escape_formula
from training.gpus.models import AuditEntry, Pool, Quota

pytestmark = pytest.mark.django_db


@pytest.fixture
def as_admin(client, people, device):
    client.force_login(people["admin"])
    return client


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ("max_memory_gb", "nan"),
        ("max_run_hours", "inf"),
        ("limit", "1.5"),
        ("hours", "-3"),
        ("weight", ""),
    ],
)
def test_an_invalid_number_is_rejected_and_stays_in_the_form(as_admin, field, text):
    form_values = {
        "guaranteed": "0",
        "limit": "1",
        "weight": "1",
        "hours": "",
        "max_memory_gb": "",
        "max_run_hours": "",
        field: text,
        "action": "save",
    }
    response = as_admin.post(f"/quotas/{Pool.objects.get().pk}/0", form_values)
    assert response.status_code == 400
    assert b'role="alert"' in response.content and (
        not text or f'value="{text}"'.encode() in response.content
    )
    assert not Quota.objects.exists()


def test_pools_and_personal_quotas_are_edited_and_errors_are_shown(as_admin, people):
    pool = Pool.objects.get()
    response = as_admin.post(
        f"/quotas/pools/{pool.pk}",
        {"name": "CPU", "runs_per_device": "9", "min_run_minutes": "10", "action": "save"},
    )
    assert response.status_code == 400
    assert_mentions(response.content.decode(), "runs_per_device", "1 to 4")
    as_admin.post(
        f"/quotas/pools/{pool.pk}",
        {"name": "Small", "runs_per_device": "2", "min_run_minutes": "5", "action": "save"},
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


def test_editing_a_pool_does_not_lift_its_hold(as_admin, people):
    pool = Pool.objects.get()
    quotas.set_hold(people["admin"], pool, is_on_hold=True)
    quotas.edit_pool(people["admin"], pool, {"runs_per_device": 2})
    assert Pool.objects.get().is_on_hold


@pytest.mark.parametrize("month", ["9999-12", "0001-01", "2026-13", "x", "2026-1\0"])
def test_an_invalid_month_is_rejected(as_admin, month):
    assert as_admin.get("/quotas/report.csv", {"month": month}).status_code == 400
    assert as_admin.get("/api/v1/gpus/usage", {"month": month}).status_code in (400, 422)


@pytest.mark.django_db(transaction=True)  # a separate thread reads the download
def test_the_audit_log_can_be_filtered_downloaded_and_verified(as_admin, people):
    audit.record_entry(people["admin"], "quota", "voice in CPU", reason="=1+1")
    audit.record_entry(None, "admitted", "run 7")
    assert b"run 7" not in as_admin.get("/audit?action=quota").content
    assert b"run 7" in as_admin.get("/audit?q=run+7").content
    assert as_admin.get("/audit?q=run+7%00").status_code == 400
    text = read_stream(as_admin.get("/audit.csv?action=quota"))
    assert "voice in CPU" in text and "'=1+1" in text and "run 7" not in text
    assert as_admin.get("/audit?check=1").context["altered_entry"] is None
    entry = AuditEntry.objects.earliest("pk")
    AuditEntry.objects.filter(pk=entry.pk).update(reason="altered")
    assert as_admin.get("/audit?check=1").context["altered_entry"] == entry


def read_stream(response):
    import asyncio

    async def gather():
        return b"".join([piece async for piece in response.streaming_content])

    return asyncio.run(gather()).decode()


def test_csv_cells_are_never_formulas():
    assert [escape_formula(cell) for cell in ("=1", "+1", "-1", "@x", "ok", 5)] == [
        "'=1",
        "'+1",
        "'-1",
        "'@x",
        "ok",
        5,
    ]
