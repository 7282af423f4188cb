"""Downloads a dataset with huggingface_hub from a local server that implements the part of the
Hub's API that is used.
"""

import io
import json
import threading
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pyarrow
import pyarrow.parquet
import pytest

from training.datasets import uploads
from training.datasets.build import BuildOptions
from training.datasets.models import Upload
from training.datasets.upload_job import UPLOAD_JOB
from training.jobs.runner import run_lane

pytestmark = [pytest.mark.django_db, pytest.mark.own_process]
COMMIT = "c" * 40


def to_parquet(rows):
    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), out)
    return out.getvalue()


FILES = {
    "default/train/0000.parquet": to_parquet(
        [{"question": f"what is {i}", "answer": str(i)} for i in range(8)]
    ),
    "default/train/0001.parquet": to_parquet(
        [{"question": f"what is {i}", "answer": str(i)} for i in range(8, 12)]
    ),
    "default/validation/0000.parquet": to_parquet(
        [{"question": "what is left", "answer": "nothing"}]
    ),
    "default/unsupervised/0000.parquet": to_parquet([{"question": "?", "answer": ""}]),
    "other/train/0000.parquet": to_parquet([{"question": "never", "answer": "seen"}]),
}


class Hub(BaseHTTPRequestHandler):
    authorizations = []

    def respond(self, body):
        Hub.authorizations.append(self.headers.get("Authorization"))
        path = unquote(urlsplit(self.path).path)
        if path.startswith("/api/datasets/owner/lamps/revision/refs/convert/parquet"):
            siblings = [
                {"rfilename": name, "size": len(content)} for name, content in FILES.items()
            ]
            return self.send_content(
                json.dumps({"id": "owner/lamps", "sha": COMMIT, "siblings": siblings}).encode(),
                body=body,
            )
        name = path.rpartition("/refs/convert/parquet/")[2]
        if path.startswith("/datasets/owner/lamps/resolve/") and name in FILES:
            return self.send_content(
                FILES[name],
                body=body,
                ETag=f'"{sha256(FILES[name]).hexdigest()}"',
                **{"X-Repo-Commit": COMMIT},
            )
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def send_content(self, content, *, body, **headers):
        self.send_response(200)
        for name, value in {"Content-Length": len(content), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def do_GET(self):
        self.respond(body=True)

    def do_HEAD(self):
        self.respond(body=False)

    def log_message(self, *_args):
        pass


@pytest.fixture
def hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")  # other tests never access the Hub
    Hub.authorizations = []
    yield
    server.shutdown()


def fetch_upload(user, hub_id):
    upload = uploads.enqueue_hub_fetch(user, hub_id, name="")
    run_lane(UPLOAD_JOB.lane)
    return Upload.objects.get(pk=upload.pk)


def test_a_hub_data_set_is_downloaded_and_saved_with_its_splits(hub, alice):
    upload = fetch_upload(alice, "owner/lamps")
    assert (upload.state, upload.error) == ("draft", "")
    assert [file["split"] for file in upload.files] == ["train", "train", "eval"]
    assert upload.mapping["columns"] == {"prompt": "question", "completion": "answer"}
    uploads.request_check(upload)
    run_lane(UPLOAD_JOB.lane)
    upload.refresh_from_db()
    uploads.request_save(upload, BuildOptions(), skip_faulty=False)
    run_lane(UPLOAD_JOB.lane)
    version = upload.versions.get()
    assert (version.dataset.name, version.train_rows, version.eval_rows) == ("lamps", 12, 1)
    # The server's token is never used for downloads of users
    assert set(Hub.authorizations) == {None}


def test_a_data_set_over_the_size_limit_is_not_downloaded(hub, alice, settings):
    settings.DATASET_MAX_BYTES = 1000
    upload = fetch_upload(alice, "owner/lamps")
    assert (upload.state, "at most 0 MiB" in upload.error) == ("failed", True)


def test_a_private_data_set_is_not_found(hub, alice):
    upload = fetch_upload(alice, "owner/secret")
    assert (upload.state, "no public dataset owner/secret" in upload.error) == ("failed", True)
