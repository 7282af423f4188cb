"""Disk quotas of users and teams: what counts, what is refused, and what the page shows."""

import zipfile
from pathlib import Path

import pytest
from django.conf import settings as django_settings
from django.db import transaction

from adapters.export import gguf, merge
from adapters.models import AdapterVersion
from adapters.registry.actions import delete_version
from adapters.registry.services import register_checkpoint
from tests import tiny
from tests.launching import launch_run
from tests.registry import register_version, train_version
from tests.user_errors import assert_mentions
from training.datasets import services, uploads
from training.datasets.models import Upload
from training.datasets.upload_handler import save_pasted_rows
from training.datasets.upload_job import create_dataset, save_version
from training.errors import Conflict, UserError
from training.gpus.models import AuditEntry
from training.jobs.models import Job
from training.people import disk_quota
from training.people.models import Team
from training.runs.actions import continue_run, delete_run, stop_run
from training.runs.models import Run

pytestmark = pytest.mark.django_db
MB = 10**6


def set_quota(holder, max_bytes):
    holder.max_disk_bytes = max_bytes
    holder.save(update_fields=["max_disk_bytes"])


def count_used(holder):
    return disk_quota.get_disk_usage(holder).used


def paste_rows(user, count=100):
    rows = b"".join(b'{"prompt": "a %d", "completion": "b"}\n' % n for n in range(count))
    pasted = save_pasted_rows(rows.decode())
    return uploads.receive_files(user, [pasted], name="Rows", source="upload")


def test_a_user_has_half_of_the_disk_unless_an_admin_or_a_setting_says_otherwise(people, settings):
    alice = people["alice"]
    assert disk_quota.get_quota(alice) > 10**9
    assert disk_quota.get_quota(people["admin"]) is None
    assert disk_quota.get_quota(Team.objects.first()) is None
    settings.DISK_QUOTA_BYTES = 5 * MB
    assert disk_quota.get_quota(alice) == 5 * MB
    set_quota(alice, 7 * MB)
    assert disk_quota.get_quota(alice) == 7 * MB


def test_data_uploads_runs_and_adapters_count_and_stop_counting_when_deleted(
    alice, data, run, settings
):
    counted = [count_used(alice)]
    version = register_version(run, weights=b"x" * 5000)
    version.update_disk_bytes()
    counted.append(count_used(alice))
    upload = paste_rows(alice)
    counted.append(count_used(alice))
    assert counted == sorted(set(counted))
    assert run.disk_bytes > 0 and data.disk_bytes > 0
    services.discard_upload(alice, upload)
    delete_version(alice, version, str(version))
    stop_run(run, discard=True)
    delete_run(alice, Run.objects.get(pk=run.pk), run.name)
    assert count_used(alice) == data.disk_bytes
    services.delete_dataset(alice, data.dataset, data.dataset.name)
    assert count_used(alice) == 0


def test_equal_content_counts_once_for_an_owner(alice, data):
    used = count_used(alice)
    create_dataset(alice, "Copy", tiny.encode_jsonl(tiny.ROWS), source="test")
    assert count_used(alice) == used


def test_an_upload_above_the_quota_is_refused_and_leaves_nothing(alice):
    set_quota(alice, 1000)
    with pytest.raises(Conflict) as error:
        paste_rows(alice)
    assert_mentions(str(error.value), "alice", "disk quota", "1 kB")
    assert error.value.code == "disk_quota"
    assert not Upload.objects.exists()
    assert not list(Path(django_settings.FILE_UPLOAD_TEMP_DIR).iterdir())


def test_checking_an_upload_reserves_what_it_may_take(alice):
    upload = paste_rows(alice)
    with transaction.atomic():
        uploads.enqueue_upload(upload)
    upload.refresh_from_db()
    assert upload.disk_bytes == uploads.DISK_FACTOR * upload.bytes
    other = paste_rows(alice)
    set_quota(alice, count_used(alice))
    with pytest.raises(Conflict), transaction.atomic():
        uploads.enqueue_upload(other)


def test_a_download_from_the_hub_is_limited_to_what_the_quota_leaves(alice, settings):
    upload = Upload.objects.create(owner=alice, name="a", source="hub: a/b", job="fetch")
    uploads.reserve_download(upload)
    assert uploads.build_params(upload)["max_bytes"] == settings.DATASET_MAX_BYTES
    set_quota(alice, 30 * MB)
    uploads.reserve_download(upload)
    assert uploads.build_params(upload)["max_bytes"] == 10 * MB
    assert count_used(alice) == 30 * MB


def test_a_launch_above_the_quota_of_the_user_or_the_team_is_refused(
    alice, data, base_model, device, no_queue
):
    team = Team.objects.get(name="voice")
    data.dataset.team = team
    data.dataset.save()
    settings = {"max_steps": 2, "max_length": 80, "rank": 4}
    for holder in (alice, team):
        set_quota(holder, count_used(holder) + 1000)
        with pytest.raises(Conflict) as error:
            launch_run(alice, base_model=base_model, data=data, settings=settings)
        assert error.value.code == "disk_quota"
        set_quota(holder, None)
    assert launch_run(alice, base_model=base_model, data=data, settings=settings).disk_bytes > 1000


def test_an_unfinished_run_counts_with_what_it_may_write(alice, run):
    reserved = run.disk_bytes
    disk_quota.update_all_disk_bytes()
    run.refresh_from_db()
    assert run.disk_bytes == reserved
    stop_run(run, discard=False)
    run.refresh_from_db()
    assert 0 < run.disk_bytes < reserved
    set_quota(alice, count_used(alice))
    with pytest.raises(Conflict):
        continue_run(alice, run)
    assert Run.objects.get(pk=run.pk).state == "cancelled"


def test_a_finished_run_counts_with_what_it_has_written(
    alice, base_model, data, device, no_queue, engine_once
):
    version = train_version(alice, base_model, data, engine_once, max_steps=2)
    run = version.run
    run.update_disk_bytes()
    assert run.disk_bytes == sum(
        path.stat().st_size for path in run.folder.rglob("*") if path.is_file()
    )
    assert version.disk_bytes == version.size_bytes
    delete_version(alice, version, str(version))
    set_quota(alice, count_used(alice))
    step = int(next((run.folder / "checkpoints").iterdir()).name.removeprefix("step-"))
    with pytest.raises(Conflict):
        register_checkpoint(alice, run, step)


def test_a_merge_and_a_gguf_export_reserve_their_size(alice, run, base_model):
    version = register_version(run)
    with pytest.raises(UserError):
        gguf.export_gguf(alice, version, "f16")  # not merged yet
    set_quota(alice, count_used(alice) + 100)
    with pytest.raises(Conflict) as error:
        merge.merge_version(alice, version)
    assert error.value.code == "disk_quota" and not Job.objects.exists()
    set_quota(alice, None)
    job = merge.merge_version(alice, version)
    reserved = AdapterVersion.objects.get(pk=version.pk).disk_bytes
    assert reserved > version.size_bytes
    merge.merge_version(alice, version)  # it is waiting already
    disk_quota.update_all_disk_bytes()
    assert AdapterVersion.objects.get(pk=version.pk).disk_bytes == reserved
    Job.objects.filter(pk=job.pk).update(state="failed")
    merge.update_version_disk_bytes(job, "It failed.")
    assert AdapterVersion.objects.get(pk=version.pk).disk_bytes < reserved


def test_the_page_shows_usage_and_what_can_be_deleted(as_alice, people, run):
    version = register_version(run, weights=b"x" * 5000)
    version.update_disk_bytes()
    set_quota(people["alice"], count_used(people["alice"]) + 10)
    page = as_alice.get("/disk").content.decode()
    assert_mentions(page, "Nearly full", "Lights", "has not ended", "used by a run")
    assert "Users and teams" not in page
    as_alice.force_login(people["mallory"])
    assert "Lights" not in as_alice.get("/disk").content.decode()
    as_alice.force_login(people["admin"])
    assert "Users and teams" in as_alice.get("/disk").content.decode()


def test_admins_edit_quotas_which_are_audited(client, people):
    client.force_login(people["admin"])
    team = Team.objects.get(name="voice")
    for path, holder in (("users/alice", people["alice"]), (f"teams/{team.pk}", team)):
        answer = client.post(f"/disk/{path}", {"max_disk_gb": "1.5", "reason": "more data"})
        assert answer.status_code == 302
        holder.refresh_from_db()
        assert holder.max_disk_bytes == 1.5e9
        page = client.get("/disk").content.decode()
        assert_mentions(page, f"The disk quota of {holder} is now 1.5 GB.", "Users and teams")
        assert AuditEntry.objects.first().after == {"max_disk_bytes": 1.5e9}
        client.post(f"/disk/{path}", {"max_disk_gb": ""})
        holder.refresh_from_db()
        assert holder.max_disk_bytes is None


@pytest.mark.parametrize("text", ["nan", "-1", "1e300", "many", "0,5"])
def test_an_invalid_quota_is_refused_and_stays_in_the_form(client, people, text):
    client.force_login(people["admin"])
    answer = client.post("/disk/users/alice", {"max_disk_gb": text})
    assert answer.status_code == 400
    assert_mentions(answer.content.decode(), "such as 50 or 0.5", f'value="{text}"')
    people["alice"].refresh_from_db()
    assert people["alice"].max_disk_bytes is None


def test_the_first_export_that_ends_keeps_the_reservations_of_the_others(alice, run):
    version = register_version(run)
    jobs = [
        merge.enqueue_export(alice, gguf.KIND, f"{version.pk}:{name}", version, disk_bytes=MB)
        for name in ("f16", "q8_0")
    ]
    Job.objects.filter(pk=jobs[0].pk).update(state="done")
    merge.update_version_disk_bytes(jobs[0])
    version.refresh_from_db()
    assert version.disk_bytes >= 2 * MB
    Job.objects.filter(pk=jobs[1].pk).update(state="failed")
    merge.update_version_disk_bytes(jobs[1])
    version.refresh_from_db()
    assert version.disk_bytes < MB


def test_a_member_cannot_exceed_the_quota_of_the_owner_of_a_dataset(people, data):
    upload = paste_rows(people["lea"])
    upload.dataset = data.dataset
    data.dataset.team = Team.objects.get(name="voice")
    data.dataset.save()
    upload.report = {"problems": {"count": 0}}
    rows = {"train": 1, "eval": 1, "test": 0}
    build_result = {"digest": "0" * 64, "rows": rows, "dropped": {}, "leaks": {}}
    set_quota(people["alice"], data.disk_bytes - 1)
    with pytest.raises(Conflict):
        save_version(upload, build_result)


def test_a_copy_of_a_dataset_counts_when_the_first_one_is_deleted(alice, data):
    create_dataset(alice, "Copy", tiny.encode_jsonl(tiny.ROWS), source="test")
    used = count_used(alice)
    services.delete_dataset(alice, data.dataset, data.dataset.name)
    assert count_used(alice) == used


def test_a_file_that_unpacks_above_the_quota_is_stopped_there(alice):
    set_quota(alice, 3 * MB)
    rows = b'{"prompt": "' + b"a" * 4000 + b'", "completion": "b"}\n'
    packed = Path(django_settings.FILE_UPLOAD_TEMP_DIR) / "rows.zip"
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("rows.jsonl", rows * 1000)
    with pytest.raises(UserError):
        uploads.receive_files(alice, [(packed, "rows.zip", "")], name="Rows", source="upload")
    assert count_used(alice) == 0


def test_an_unpacked_upload_counts_with_its_unpacked_size(alice):
    packed = Path(django_settings.FILE_UPLOAD_TEMP_DIR) / "rows.zip"
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("rows.jsonl", b'{"prompt": "a", "completion": "b"}\n' * 10_000)
    upload = uploads.receive_files(alice, [(packed, "rows.zip", "")], name="Rows", source="upload")
    assert upload.bytes >= 300_000
    assert count_used(alice) >= 300_000


@pytest.mark.parametrize("changes", [{"use_dora": True}, {"rank_pattern": "q_proj=64"}])
def test_a_run_without_a_forecast_of_its_parameters_reserves_about_as_much(
    alice, data, base_model, device, no_queue, changes
):
    plain = {"max_steps": 2, "max_length": 80, "rank": 8}
    reserved = launch_run(alice, base_model=base_model, data=data, settings=plain).disk_bytes
    other = launch_run(alice, base_model=base_model, data=data, settings=plain | changes)
    assert other.disk_bytes >= reserved
