"""A large upload to a running site: the web server's memory does not grow with the file, and an
aborted upload leaves nothing behind.
"""

import json
import socket
from pathlib import Path

import httpx
import pytest

from tests.running_site import RunningSite

pytestmark = pytest.mark.slow
MIB = 2**20


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    with RunningSite(tmp_path_factory.mktemp("large")) as running:
        yield running


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    path = tmp_path_factory.mktemp("file") / "large.jsonl"
    line = json.dumps({"prompt": "word " * 800, "completion": "yes"}) + "\n"
    with path.open("w") as out:
        for number in range(300 * MIB // len(line)):
            out.write(line.replace("yes", f"yes {number}"))
    return path


def peak_bytes(pid):
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def test_the_web_servers_memory_stays_small_and_the_data_is_saved(site, large):
    before = peak_bytes(site.find_pid("web"))
    headers = {"Authorization": f"Bearer {site.token}"}
    with (
        large.open("rb") as file,
        httpx.Client(base_url=site.address, headers=headers, timeout=300) as client,
    ):
        upload = (
            client.post("/api/v1/datasets/uploads", files={"file": ("large.jsonl", file)})
            .raise_for_status()
            .json()
        )
        assert upload["bytes"] == large.stat().st_size
        assert peak_bytes(site.find_pid("web")) - before < 60 * MIB
        address = f"/api/v1/datasets/uploads/{upload['id']}"
        client.post(address + "/check").raise_for_status()
        site.wait_for(lambda: client.get(address).json()["state"] == "checked", 300)
        client.post(address + "/save", json={}).raise_for_status()
        site.wait_for(lambda: client.get(address).json()["state"] == "done", 120)


def test_an_aborted_upload_leaves_no_files(site, large):
    host, port = site.address.removeprefix("http://").split(":")
    incoming = Path(site.home) / "incoming"
    head = (
        f"POST /api/v1/datasets/uploads HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer "
        f"{site.token}\r\nContent-Type: multipart/form-data; boundary=x\r\nContent-Length: "
        f"{200 * MIB}\r\n\r\n"
    )
    with socket.create_connection((host, int(port)), 10) as connection:
        connection.sendall(head.encode())
        for _ in range(20):
            connection.sendall(b"x" * MIB)
    site.wait_for(lambda: list(incoming.iterdir()) == [], 30)
    assert len(list(Path(site.home).glob("uploads/*"))) <= 1
