"""The web server itself, over raw sockets: what is cut off before Django sees it, and what clients
cannot make it believe.
"""

import os
import socket
import subprocess
import sys
import time

import pytest

from tests.running_site import ROOT, find_free_port

MIB = 2**20


@pytest.fixture(scope="module")
def port(tmp_path_factory):
    home = tmp_path_factory.mktemp("web")
    number = find_free_port()
    env = {
        **os.environ,
        "SNAPML_HOME": str(home),
        "DJANGO_SETTINGS_MODULE": "snapml_site.settings",
        "TMPDIR": str(home),
    }
    command = [
        sys.executable,
        "-m",
        "snapml_site.web_server",
        "-v",
        "0",
        "-p",
        str(number),
        "snapml_site.asgi:application",
    ]
    subprocess.run(
        [sys.executable, "manage.py", "migrate", "-v", "0"], cwd=ROOT, env=env, check=True
    )
    server = subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.DEVNULL)
    for _ in range(200):
        try:
            socket.create_connection(("127.0.0.1", number), 1).close()
            break
        except OSError:
            time.sleep(0.1)
    yield number
    server.kill()
    server.wait()


def send_request(port, head, body=b""):
    """The first bytes of the answer, and how many bytes of the body the server took."""
    with socket.create_connection(("127.0.0.1", port), 5) as connection:
        connection.sendall(head.replace(b"\n", b"\r\n") + b"\r\n\r\n")
        sent = 0
        try:
            for offset in range(0, len(body), 65536):
                connection.sendall(body[offset : offset + 65536])
                sent = offset + 65536
        except OSError:
            pass  # it hung up
        try:
            return connection.recv(4096), sent
        except ConnectionResetError:
            return b"", sent


def test_it_works(port):
    assert send_request(port, b"GET /health HTTP/1.1\nHost: localhost")[0].startswith(
        b"HTTP/1.1 200"
    )


def test_a_body_that_says_it_is_too_long_is_refused_at_once(port):
    answer, _ = send_request(
        port, b"POST /health HTTP/1.1\nHost: localhost\nContent-Length: 99999999999"
    )
    assert answer.startswith(b"HTTP/1.1 413")


def test_a_body_without_a_length_is_cut_off_while_it_arrives(port):
    chunk = b"10000\r\n" + b"x" * 65536 + b"\r\n"
    answer, sent = send_request(
        port, b"POST /health HTTP/1.1\nHost: localhost\nTransfer-Encoding: chunked", chunk * 400
    )
    assert answer == b"" or answer.startswith(b"HTTP/1.1 413")
    assert sent < 20 * MIB


HEAD = b"POST %s HTTP/1.1\nHost: localhost\nContent-Type: text/plain\nContent-Length: %d"


@pytest.mark.parametrize("path", [b"/sign-in", b"/data/new", b"/api/v1/datasets/uploads"])
@pytest.mark.parametrize(
    "more", [b"", b"\nCookie: snapml_session=nobody", b"\nAuthorization: Bearer snapml_nobody"]
)
def test_a_stranger_sends_no_more_than_a_form(port, path, more):
    assert send_request(port, HEAD % (path, 2 * MIB) + more)[0].startswith(b"HTTP/1.1 413")


@pytest.mark.parametrize(
    "header",
    [b"Daphne-Root-Path: /evil", b"X-Forwarded-Host: evil.example", b"X-Script-Name: /evil"],
)
def test_no_header_moves_the_sites_addresses(port, header):
    answer, _ = send_request(port, b"GET / HTTP/1.1\nHost: localhost\n" + header)
    assert b"Location: /sign-in?next=/" in answer
    assert b"evil" not in answer


def test_another_host_name_is_refused(port):
    assert send_request(port, b"GET /sign-in HTTP/1.1\nHost: evil.example")[0].startswith(
        b"HTTP/1.1 400"
    )
