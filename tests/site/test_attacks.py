"""The items of the attack checklist (paths, uploads, identity, output, load) that no other file
covers. The number in a test's name is the item.
"""

import json

import pytest
from django.core.files.uploadedfile import SimpleUploadedFile

from tests import tiny
from training.datasets.models import Dataset, Upload
from training.people.models import ApiToken, Team
from training.people.tokens import create_token
from training.runs.models import Run

pytestmark = pytest.mark.django_db
BAD_NAMES = [
    "../../x.csv",
    "..%2fx.csv",
    "..\\x.csv",
    "/etc/passwd",
    "file:///x.csv",
    "x.csv.",
    "a" * 300 + ".csv",
    "a\u2215b.csv",
    "-rf.csv",
    "$(id).csv",
    "x.html",
    "x.svg",
]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_1_and_21_a_file_name_is_never_used_as_a_path_or_command(as_alice, settings, name):
    as_alice.post(
        "/data/new", {"file": SimpleUploadedFile("x", b"question,answer\na,b\nc,d\n"), "name": name}
    )
    upload = Upload.objects.get()
    assert sorted(path.name for path in upload.folder.iterdir()) == [
        "0",
        "params.json",
        "sample.json",
    ]


def test_2_symlinks_in_a_run_folder_are_not_listed_or_followed(as_alice, run):
    (run.folder / "engine.log").symlink_to("/etc/passwd")
    (run.folder / "checkpoints").mkdir()
    (run.folder / "checkpoints" / "link").symlink_to("/etc")
    page = as_alice.get(f"/runs/{run.pk}/files").content.decode()
    assert "engine.log" not in page
    assert "link" not in page
    assert "root:" not in as_alice.get(f"/runs/{run.pk}/log").content.decode()


@pytest.mark.parametrize(
    "content",
    [b"PK\x03\x04" + b"x" * 50, b"\x1f\x8b\x08\x00not really", b"PAR1" + b"\xff" * 50 + b"PAR1"],
)
def test_3_and_4_archives_and_wrong_magic_bytes_are_rejected_and_deleted(
    as_alice, settings, content
):
    answer = as_alice.post("/data/new", {"file": SimpleUploadedFile("a.jsonl", content)})
    assert answer.status_code == 400
    assert not Upload.objects.exists()


def test_4_two_uploads_of_the_same_name_get_two_folders(as_alice):
    for text in ("a", "b"):
        as_alice.post(
            "/data/new",
            {
                "file": SimpleUploadedFile(
                    "same.csv", f"question,answer\n{text},1\n{text},2\n".encode()
                )
            },
        )
    folders = {upload.folder for upload in Upload.objects.all()}
    assert len(folders) == 2


def test_4_uploaded_files_are_never_served(as_alice):
    as_alice.post(
        "/data/new",
        {
            "file": SimpleUploadedFile(
                "x.html", b"question,answer\n<script>alert(1)</script>,b\nc,d\n"
            )
        },
    )
    answer = as_alice.get(f"/data/uploads/{Upload.objects.get().pk}")
    assert "<script>alert" not in answer.content.decode()
    assert "unsafe-inline" not in answer["Content-Security-Policy"].split("style-src-attr")[0]
    assert as_alice.get(f"/data/uploads/{Upload.objects.get().pk}/0").status_code == 404


def test_10_a_formula_in_a_run_name_does_not_reach_the_csv_file(as_alice, run):
    Run.objects.filter(pk=run.pk).update(name="=cmd|'/c calc'!A1")
    answer = as_alice.get(f"/runs/{run.pk}/metrics.csv")
    assert "cmd" not in answer["Content-Disposition"]


@pytest.mark.parametrize(
    "body",
    [
        {"owner": 1},
        {"team": 1},
        {"state": "finished"},
        {"lease_token": "x"},
        {"best_eval_loss": 0},
        {"sweep": 1},
    ],
)
def test_18_protected_fields_are_rejected(as_alice, run, body):
    for method, path in (("patch", f"/api/v1/runs/{run.pk}"), ("post", "/api/v1/runs")):
        answer = getattr(as_alice, method)(
            path,
            json.dumps({"model": run.base_model_id, "data": run.data_id, **body}),
            content_type="application/json",
        )
        assert answer.status_code == 422
    run.refresh_from_db()
    assert (run.owner.username, run.state) == ("alice", "queued")


def test_18_a_data_set_cannot_be_moved_to_another_team(as_alice, people, data):
    other = Team.objects.get(name="others")
    as_alice.patch(
        f"/api/v1/datasets/{data.dataset_id}",
        json.dumps({"name": "x", "team": other.pk}),
        content_type="application/json",
    )
    assert Dataset.objects.get(pk=data.dataset_id).team.name == "voice"


def test_20_tokens_are_stored_as_digests_and_end_with_their_user(client, alice):
    token, secret = create_token(alice, "x")
    assert secret not in json.dumps(list(ApiToken.objects.values()), default=str)
    alice.is_active = False
    alice.save()
    assert (
        client.get("/api/v1/runs", headers={"authorization": f"Bearer {secret}"}).status_code == 401
    )
    assert token.hint == secret[-4:]


def test_20_the_session_key_changes_at_sign_in(client, alice):
    client.get("/sign-in")
    before = client.session.session_key
    client.post("/sign-in", {"username": "alice", "password": "a-long-word-1"})
    assert client.session.session_key != before


MARKUP = "<script>alert(1)</script><img src=x onerror=alert(2)>"


def test_22_markup_in_tags_notes_teams_and_models_is_escaped(as_alice, alice, run, base_model):
    Run.objects.filter(pk=run.pk).update(
        name=MARKUP, notes=MARKUP, message=MARKUP, tags=f",{MARKUP},", state="failed"
    )
    base_model.name = MARKUP[:100]
    base_model.save()
    Team.objects.filter(name="voice").update(name=MARKUP[:80])
    copy = Run.objects.get(pk=run.pk)
    copy.pk = None
    copy.save()
    for path in (
        "/",
        f"/runs/{run.pk}",
        f"/runs/{run.pk}/header",
        f"/runs/compare?run={run.pk}&run={copy.pk}",
        "/account",
        "/models",
        "/runs/new",
        "/status-bar",
    ):
        page = as_alice.get(path).content.decode()
        assert "<script>alert" not in page, path
        assert "<img src=x" not in page, path


def test_23_long_and_colored_log_lines_are_shown_as_plain_text(as_alice, run):
    (run.folder / "engine.log").write_text("\x1b[31mred\x1b[0m <b>x</b>\n" + "y" * 1_000_000)
    page = as_alice.get(f"/runs/{run.pk}/log").content.decode()
    assert len(page) < 100_000
    assert "\x1b" not in page


@pytest.mark.parametrize(
    "query",
    [
        "?page=999999999999",
        "?page=-1",
        "?page=x",
        "?q=" + "(a+)+" * 20,
        "?q=%25_%25",
        "?tag=" + "x" * 500,
    ],
)
def test_27_invalid_pages_and_searches_are_answered(as_alice, run, query):
    assert as_alice.get("/" + query).status_code == 200


def test_27_a_sweep_of_millions_of_runs_is_rejected_before_it_is_built(as_alice, base_model, data):
    settings = {
        name: list(range(1, 400))
        for name in ("rank", "alpha", "epochs", "gradient_accumulation_steps")
    }
    body = json.dumps({"model": base_model.pk, "data": data.pk, "settings": settings})
    assert (
        as_alice.post("/api/v1/runs/sweeps", body, content_type="application/json").status_code
        == 413
    )
    settings = {f"nothing{number}": [1, 2] for number in range(5000)}
    body = json.dumps({"model": base_model.pk, "data": data.pk, "settings": settings})
    assert (
        as_alice.post("/api/v1/runs/sweeps", body, content_type="application/json").status_code
        == 400
    )


def test_27_a_row_with_thousands_of_turns_is_truncated(as_alice, alice):
    from training.datasets.upload_job import create_dataset

    long = {
        "messages": [
            {"role": role, "content": "x"} for _ in range(3000) for role in ("user", "assistant")
        ]
    }
    version = create_dataset(alice, "Long", tiny.encode_jsonl([long, *tiny.ROWS]), source="x")
    page = as_alice.get(f"/data/{version.dataset_id}").content.decode()
    assert len(page) < 200_000
