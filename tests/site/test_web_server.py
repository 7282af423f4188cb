"""The web server over raw sockets: what it rejects before Django sees it, and headers that clients
cannot forge.
"""

import json
import os
import socket
import subprocess
import sys
import time

import psutil
import pytest

from benchmarks.web_sockets import open_socket
from tests.running_site import ROOT, find_free_port
from tests.user_errors import assert_mentions

MIB = 2**20


@pytest.fixture(scope="module")
def env(tmp_path_factory):
    home = tmp_path_factory.mktemp("web")
    return {
        **os.environ,
        "SNAPML_HOME": str(home),
        "DJANGO_SETTINGS_MODULE": "snapml_site.settings",
        "TMPDIR": str(home),
    }


@pytest.fixture(scope="module")
def port():
    return find_free_port()


@pytest.fixture(scope="module")
def log_path(tmp_path_factory):
    """What the server writes to stderr."""
    return tmp_path_factory.mktemp("log") / "stderr"


@pytest.fixture(scope="module", autouse=True)
def server_process(env, port, log_path):
    command = [
        sys.executable,
        "-m",
        "snapml_site.web_server",
        "-v",
        "0",
        "-p",
        str(port),
        "snapml_site.asgi:application",
    ]
    subprocess.run(
        [sys.executable, "manage.py", "migrate", "-v", "0"], cwd=ROOT, env=env, check=True
    )
    with log_path.open("wb") as log_file:
        server = subprocess.Popen(command, cwd=ROOT, env=env, stderr=log_file)
    for _ in range(200):
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            break
        except OSError:
            time.sleep(0.1)
    yield psutil.Process(server.pid)
    server.kill()
    server.wait()


def run_shell(env, code):
    """The last word that the code prints."""
    command = [sys.executable, "manage.py", "shell", "-v", "0", "-c", code]
    return subprocess.run(
        command, cwd=ROOT, env=env, check=True, capture_output=True, text=True
    ).stdout.split()[-1]


def send_request(port, head, body=b""):
    """The first bytes of the response, and how many bytes of the body the server accepted."""
    with socket.create_connection(("127.0.0.1", port), 5) as connection:
        connection.sendall(head.replace(b"\n", b"\r\n") + b"\r\n\r\n")
        sent = 0
        try:
            for offset in range(0, len(body), 65536):
                connection.sendall(body[offset : offset + 65536])
                sent = offset + 65536
        except OSError:
            pass  # the server closed the connection
        try:
            return connection.recv(4096), sent
        except ConnectionResetError:
            return b"", sent


def test_the_health_page_is_served(port):
    assert send_request(port, b"GET /health HTTP/1.1\nHost: localhost")[0].startswith(
        b"HTTP/1.1 200"
    )


def test_a_body_with_a_too_large_content_length_is_rejected_at_once(port):
    answer, _ = send_request(
        port, b"POST /health HTTP/1.1\nHost: localhost\nContent-Length: 99999999999"
    )
    assert answer.startswith(b"HTTP/1.1 413")


def test_a_chunked_body_is_aborted_at_the_limit(port):
    chunk = b"10000\r\n" + b"x" * 65536 + b"\r\n"
    answer, sent = send_request(
        port, b"POST /health HTTP/1.1\nHost: localhost\nTransfer-Encoding: chunked", chunk * 400
    )
    assert answer == b"" or answer.startswith(b"HTTP/1.1 413")
    assert sent < 20 * MIB


HEAD = b"POST %s HTTP/1.1\nHost: localhost\nContent-Type: text/plain\nContent-Length: %d"


def send_large_body(port, path, more=b""):
    """The status of the response, and the error in its JSON."""
    answer, _ = send_request(port, HEAD % (path, 2 * MIB) + more)
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]


def test_a_large_body_of_a_user_who_has_not_changed_the_password_is_a_401(port, env):
    code = (
        "from training.people.models import User\n"
        "from training.people.tokens import create_token\n"
        "user = User.objects.create_user('carol', password='x', must_change_password=True)\n"
        "print(create_token(user, 'upload')[1])"
    )
    more = b"\nAuthorization: Bearer " + run_shell(env, code).encode()
    status, error = send_large_body(port, b"/api/v1/datasets/uploads", more)
    assert status == 401
    assert_mentions(error["message"], "carol")


@pytest.mark.parametrize(
    ("path", "status"),
    [
        (b"/sign-in", 413),
        (b"/api/v1/runs", 413),
        (b"/data/new", 401),
        (b"/adapters/import", 401),
        (b"/api/v1/datasets/uploads", 401),
        (b"/api/v1/adapters/import", 401),
    ],
)
@pytest.mark.parametrize(
    "more", [b"", b"\nCookie: snapml_session=nobody", b"\nAuthorization: Bearer snapml_nobody"]
)
def test_anonymous_clients_cannot_send_large_bodies(port, path, status, more):
    answer_status, error = send_large_body(port, path, more)
    assert answer_status == status
    assert set(error) == {"message", "field"}


def test_a_large_body_for_the_openai_api_is_an_error_in_its_format(port):
    status, error = send_large_body(port, b"/v1/chat/completions")
    assert status == 413
    assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    "header",
    [b"Daphne-Root-Path: /evil", b"X-Forwarded-Host: evil.example", b"X-Script-Name: /evil"],
)
def test_headers_cannot_change_urls(port, header):
    answer, _ = send_request(port, b"GET / HTTP/1.1\nHost: localhost\n" + header)
    assert b"Location: /sign-in?next=/" in answer
    assert b"evil" not in answer


LOCALHOST = b"Host: localhost"
SOCKET = (
    b"%s\nOrigin: http://localhost\nUpgrade: websocket\nConnection: Upgrade\n"
    b"Sec-WebSocket-Version: 13\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==" % LOCALHOST
)
FORM = LOCALHOST + b"\nContent-Length: 0"


@pytest.mark.parametrize(
    ("line", "headers", "status"),
    [
        (b"GET /sign-in", b"Host: evil.example", 400),
        (b"GET /sign-in", b"Host: ", 400),
        (b"GET /sign-in", b"Host: [::1", 400),
        (b"GET /sign-in", b"Host: \xff", 400),
        (b"GET /sign-in", b"Host: " + b"a" * 9000, 400),
        (b"GET /sign-in", LOCALHOST + b"\n" + LOCALHOST, 400),
        (b"GET /sign-in", LOCALHOST + b"\nDaphne-Root-Path: \xff", 400),
        (b"GET /" + b"a" * 9000, LOCALHOST, 404),
        (b"POST /sign-in", FORM, 403),
        (b"POST /sign-in", FORM + b"\nOrigin: http://" + b"a" * 9000, 403),
        (b"GET /ws/nothing", SOCKET, 403),
        (b"GET /ws/" + b"a" * 9000, SOCKET, 403),
        (b"GET /ws/live", SOCKET + b"\nSec-WebSocket-Protocol: \xff", 400),
    ],
)
def test_a_bad_request_is_at_most_one_short_line_in_the_log(port, log_path, line, headers, status):
    before = log_path.stat().st_size
    answer, _ = send_request(port, line + b" HTTP/1.1\n" + headers)
    assert answer.startswith(b"HTTP/1.1 %d" % status)
    logged = log_path.read_bytes()[before:]
    assert logged.count(b"\n") <= 1 and len(logged) < 400


@pytest.mark.parametrize("headers", [LOCALHOST, b"Host: LOCALHOST.:81", b"Host: [::1]:81", b"A: b"])
def test_a_name_of_the_site_with_any_port_is_served_and_so_is_a_missing_host(port, headers):
    answer, _ = send_request(port, b"GET /health HTTP/1.0\n" + headers)
    assert answer.startswith(b"HTTP/1.0 200")


DOWNLOAD_CODE = """
from adapters.models import AdapterVersion
from training.catalog.models import BaseModel
from training.people.models import User
from training.people.tokens import create_token
user = User.objects.create_user("dora", password="x")
base = BaseModel.objects.create(name="base", source="folder", location="/none", state="ready")
version = AdapterVersion.objects.create(
    owner=user, name="Large", number=1, base_model=base, method="lora", step=1, sha256="a",
    size_bytes=1, files={"adapter_model.safetensors": {"sha256": "a", "bytes": 1}},
)
version.folder.mkdir(parents=True)
with (version.folder / "adapter_model.safetensors").open("wb") as file:
    file.truncate(100 * 2**20)
print(create_token(user, "download")[1])
"""


def test_a_download_is_read_as_the_client_takes_it(port, env, server_process):
    token = run_shell(env, DOWNLOAD_CODE)
    head = (
        "GET /api/v1/adapters/1/download HTTP/1.1\r\nHost: localhost\r\n"
        f"Authorization: Bearer {token}\r\n\r\n"
    ).encode()
    before = server_process.memory_info().rss
    connections = [socket.create_connection(("127.0.0.1", port), 10) for _ in range(3)]
    for connection in connections:
        connection.sendall(head)
    deadline, growth = time.monotonic() + 4, 0
    while time.monotonic() < deadline:
        growth = max(growth, server_process.memory_info().rss - before)
        time.sleep(0.1)
    assert growth < 60 * MIB  # three files of 100 MiB
    received = 0
    connections[0].settimeout(30)
    while received < 100 * MIB:
        chunk = connections[0].recv(2**20)
        assert chunk
        received += len(chunk)
    for connection in connections:
        connection.close()
    assert send_request(port, b"GET /health HTTP/1.1\nHost: localhost")[0].startswith(
        b"HTTP/1.1 200"
    )


USERS_CODE = """
from training.people.models import User
from training.people.tokens import create_token
users = [User.objects.create_user(name, password="x") for name in ("erin", "finn")]
print(",".join(create_token(user, "upload")[1] for user in users))
"""


def test_a_user_has_two_uploads_at_a_time_and_others_have_theirs(port, env):
    erin, finn = run_shell(env, USERS_CODE).split(",")

    def start_upload(token):
        connection = socket.create_connection(("127.0.0.1", port), 5)
        head = HEAD % (b"/api/v1/datasets/uploads", 5 * MIB)
        head += b"\nAuthorization: Bearer " + token.encode()
        connection.sendall(head.replace(b"\n", b"\r\n") + b"\r\n\r\nsome")
        return connection

    connections = [start_upload(erin) for _ in range(2)]
    time.sleep(0.5)
    rejected = start_upload(erin)
    assert rejected.recv(100).startswith(b"HTTP/1.1 429")
    other = start_upload(finn)
    other.settimeout(1)
    with pytest.raises(TimeoutError):  # it is accepted, so the server waits for the rest
        other.recv(100)
    for connection in (*connections, rejected, other):
        connection.close()
    time.sleep(0.5)
    again = start_upload(erin)
    again.settimeout(1)
    with pytest.raises(TimeoutError):
        again.recv(100)
    again.close()


RATE_CODE = """
import snapml_site.web_server as web
class Upload(web.LimitedRequest):
    def __init__(self): pass
    def reject_request(self): self.is_rejected = True
def is_ended(seconds, pause, received, is_complete=False):
    upload = Upload()
    now = web.time.monotonic()
    upload.started_at, upload.last_chunk_at = now - seconds, now - pause
    upload.received, upload.is_complete = received, is_complete
    upload.check_rate()
    return int(upload.is_rejected)
fast = 100 * 2**20
print("".join(map(str, (
    is_ended(20, 20, 0), is_ended(40, 1, fast), is_ended(40, 35, fast), is_ended(40, 1, 1000),
    is_ended(400, 300, 1000, is_complete=True),
))))
"""


def test_an_upload_that_pauses_or_crawls_is_ended(env):
    code = RATE_CODE
    command = [sys.executable, "-c", code]
    output = subprocess.run(
        command, cwd=ROOT, env=env, check=True, capture_output=True, text=True
    ).stdout
    assert output.strip() == "00110"


SESSION_CODE = """
from django.contrib.auth import BACKEND_SESSION_KEY, HASH_SESSION_KEY, SESSION_KEY
from django.contrib.sessions.backends.db import SessionStore
from training.people.models import User
user = User.objects.create_user("socket", password="x")
session = SessionStore()
session[SESSION_KEY] = str(user.pk)
session[BACKEND_SESSION_KEY] = "django.contrib.auth.backends.ModelBackend"
session[HASH_SESSION_KEY] = user.get_session_auth_hash()
session.save()
print(session.session_key)
"""


@pytest.fixture(scope="module")
def session(env):
    return run_shell(env, SESSION_CODE).strip()


@pytest.mark.parametrize("kind", ["pings", "messages"])
def test_a_socket_that_is_flooded_and_never_read_is_ended(port, session, server_process, kind):
    connection = open_socket(port, session, buffer_bytes=4096)
    connection.settimeout(30)
    opcode, payload = (0x89, b"x" * 125) if kind == "pings" else (0x81, b" " * 4096)
    size = bytes([0x80 | 125]) if kind == "pings" else bytes([0x80 | 126]) + b"\x10\x00"
    frame = bytes([opcode]) + size + bytes(4) + payload  # masked with zeros
    before, sent = server_process.memory_info().rss, 0
    with pytest.raises(OSError):
        while sent < 200 * MIB:
            connection.sendall(frame * 500)
            sent += 500 * len(frame)
    connection.close()
    assert server_process.memory_info().rss - before < 30 * MIB


def test_a_client_that_reads_gets_its_pongs(port, session):
    connection = open_socket(port, session)
    connection.settimeout(10)
    connection.sendall(bytes([0x89, 0x84]) + bytes(4) + b"ping")
    assert connection.recv(6) == bytes([0x8A, 4]) + b"ping"
    connection.close()
