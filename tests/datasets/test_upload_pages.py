"""The upload pages: upload, map, check and save; other users cannot see an upload."""

from pathlib import Path

import pytest
from django.core.files.uploadedfile import SimpleUploadedFile

from tests import tiny
from training.datasets.models import Dataset, Upload
from training.datasets.upload_job import UPLOAD_JOB
from training.jobs.runner import run_lane

pytestmark = pytest.mark.django_db
LIGHTS = b"".join(tiny.encode_jsonl(tiny.ROWS))


def post_file(client, content=LIGHTS, file_name="lights.jsonl", **fields):
    return client.post("/data/new", {"file": SimpleUploadedFile(file_name, content), **fields})


def list_incoming(settings):
    return list(Path(settings.FILE_UPLOAD_TEMP_DIR).iterdir())


def test_a_file_is_uploaded_mapped_checked_and_saved(as_alice, settings):
    answer = post_file(as_alice)
    upload = Upload.objects.get()
    assert answer["Location"] == f"/data/uploads/{upload.pk}"
    assert list_incoming(settings) == []
    page = as_alice.get(answer["Location"]).content.decode()
    assert "OpenAI messages" in page
    assert "turn on the kitchen lamp" in page
    mapping = {"row_format": "messages", "column-messages": "messages", "check": "1"}
    assert (
        "Checking all rows"
        in as_alice.post(f"/data/uploads/{upload.pk}/map", mapping).content.decode()
    )
    run_lane(UPLOAD_JOB.lane)
    assert f"{len(tiny.ROWS)} valid rows" in as_alice.get(answer["Location"]).content.decode()
    as_alice.post(f"/data/uploads/{upload.pk}/save", {"seed": "0"})
    run_lane(UPLOAD_JOB.lane)
    assert "Saved as lights v1" in as_alice.get(answer["Location"]).content.decode()
    assert "kitchen" in as_alice.get(f"/data/{Dataset.objects.get().pk}").content.decode()


def test_the_preview_follows_a_change_of_the_mapping(as_alice):
    post_file(as_alice, b"id,Frage,Antwort\n1,what,that\n2,who,me\n", "f.csv")
    upload = Upload.objects.get()
    mapping = {
        "row_format": "pairs",
        "column-prompt": "Frage",
        "column-completion": "Antwort",
        "delimiter": ",",
        "has_header": "1",
        "header": "1",
    }
    page = as_alice.post(f"/data/uploads/{upload.pk}/map", mapping).content.decode()
    assert '<span class="who">user</span>what' in page
    assert Upload.objects.get().mapping["columns"] == {"prompt": "Frage", "completion": "Antwort"}


def test_a_missing_column_is_reported_and_the_form_keeps_its_values(as_alice):
    post_file(as_alice, b"id,Frage,Antwort\n1,what,that\n2,who,me\n", "f.csv")
    upload = Upload.objects.get()
    page = as_alice.post(
        f"/data/uploads/{upload.pk}/map", {"row_format": "pairs", "column-prompt": "Frage"}
    ).content.decode()
    assert "Choose the column that holds the completion." in page
    assert '<option value="Frage" selected>' in page


def test_rows_can_be_pasted(as_alice):
    answer = as_alice.post("/data/new", {"rows": LIGHTS.decode(), "name": "Typed"})
    assert answer.status_code == 302
    assert Upload.objects.get().name == "Typed"


def test_scripts_get_the_url_or_the_error_as_json(as_alice):
    answer = as_alice.post(
        "/data/new",
        {"file": SimpleUploadedFile("a.jsonl", LIGHTS)},
        headers={"accept": "application/json"},
    )
    assert answer.json()["url"].startswith("/data/uploads/")
    answer = as_alice.post(
        "/data/new",
        {"file": SimpleUploadedFile("a.jsonl", b"")},
        headers={"accept": "application/json"},
    )
    assert answer.status_code == 400


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK\x03\x04x", "The zip file is damaged"),
        (b"  ", "is empty"),
        (b'{"a": 1\n"b": 2}\n', "not JSON"),
    ],
)
def test_an_unreadable_file_is_rejected_and_deleted(as_alice, settings, content, message):
    answer = post_file(as_alice, content, name="My lamps.jsonl")
    assert answer.status_code == 400
    assert message in answer.content.decode()
    assert not Upload.objects.exists()
    assert list_incoming(settings) == []


def test_an_upload_over_the_size_limit_is_aborted_and_deleted(as_alice, settings, tmp_path):
    settings.DATASET_MAX_BYTES = 100_000
    settings.FILE_UPLOAD_TEMP_DIR = str(tmp_path)
    answer = post_file(as_alice, b"x" * 400_000)
    assert answer.status_code == 413
    assert "Nothing was saved" in answer.content.decode()
    assert list(tmp_path.iterdir()) == []
    assert not Upload.objects.exists()


@pytest.mark.parametrize(
    "hub_id", ["../../etc", "a/b/c", "-x/y", "file:///etc/passwd", "http://127.0.0.1/x"]
)
def test_an_invalid_hub_id_is_rejected(as_alice, hub_id):
    assert as_alice.post("/data/new", {"hub_id": hub_id}).status_code == 400
    assert not Upload.objects.exists()


@pytest.mark.own_process
def test_an_unreachable_hub_fails_the_upload(as_alice, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    as_alice.post("/data/new", {"hub_id": "owner/name"})
    upload = Upload.objects.get()
    run_lane(UPLOAD_JOB.lane)
    upload.refresh_from_db()
    assert (upload.state, "cannot be reached" in upload.error) == ("failed", True)


@pytest.mark.parametrize(
    ("path", "method"),
    [("", "get"), ("/map", "post"), ("/save", "post"), ("/remap", "post"), ("/discard", "post")],
)
def test_other_users_get_404(as_alice, client, people, path, method):
    post_file(as_alice)
    client.force_login(people["mallory"])
    assert (
        getattr(client, method)(f"/data/uploads/{Upload.objects.get().pk}{path}").status_code == 404
    )


def test_a_teammate_can_view_but_not_change_an_upload(as_alice, client, people):
    post_file(as_alice)
    client.force_login(people["bob"])
    address = f"/data/uploads/{Upload.objects.get().pk}"
    assert client.get(address).status_code == 200
    assert client.post(address + "/save").status_code == 403


def test_an_upload_can_be_discarded(as_alice):
    post_file(as_alice)
    upload = Upload.objects.get()
    as_alice.post(f"/data/uploads/{upload.pk}/discard")
    assert not upload.folder.exists()


def test_markup_in_rows_names_and_columns_is_escaped(as_alice):
    rows = b"<b>q</b>,a\n<script>alert(1)</script>,x\n<script>alert(2)</script>,y\n"
    answer = post_file(as_alice, rows, "x.csv", name="<img src=x>")
    page = as_alice.get(answer["Location"]).content.decode()
    assert "<script>alert" not in page
    assert "<img src=x>" not in page
    assert "<b>q</b>" not in page
    assert "&lt;script&gt;" in page
