"""Webhooks are signed, retried, and never sent to private addresses."""

import json
import threading
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import standardwebhooks
from django.utils import timezone

from training.jobs.models import Job
from training.jobs.runner import run_lane
from training.webhooks import services as webhooks
from training.webhooks.models import Delivery, Webhook
from training.webhooks.services import (
    WEBHOOK_JOB,
    UnreachableAddress,
    add_webhook,
    create_secret,
    enqueue_deliveries,
    signed_headers,
)

pytestmark = pytest.mark.django_db


def send_due_messages():
    """Run the waiting jobs; returns how many messages were sent."""
    before = sum(Delivery.objects.values_list("tries", flat=True))
    run_lane(WEBHOOK_JOB.lane)
    return sum(Delivery.objects.values_list("tries", flat=True)) - before


@pytest.fixture
def listener(settings):
    """A web server on localhost, allowed by WEBHOOK_HOSTS: its requests and the status to send."""
    received = {"requests": [], "status": 200}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            received["requests"].append((self.path, dict(self.headers), body))
            self.send_response(received["status"])
            if received["status"] == 302:
                self.send_header("Location", "http://127.0.0.1:1/secret")
            self.end_headers()

        def log_message(self, *_args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    settings.WEBHOOK_HOSTS = ["localhost"]
    received["url"] = f"http://localhost:{server.server_port}/hook?x=1"
    yield received
    server.shutdown()


def send_again(listener):
    """Try the waiting message once. Returns the headers and body that the listener received."""
    Job.objects.update(run_after=timezone.now() - timedelta(seconds=1))
    assert send_due_messages() == 1
    return listener["requests"][-1][1:]


def test_a_message_arrives_once_with_a_standard_webhooks_signature(listener, alice):
    hook = add_webhook(alice, listener["url"])
    assert hook.secret.startswith("whsec_")
    enqueue_deliveries(alice, '{"event": "x"}')
    assert send_due_messages() == 1
    path, headers, body = listener["requests"][0]
    assert (path, body) == ("/hook?x=1", '{"event": "x"}')
    assert headers["Host"].startswith("localhost:")
    assert standardwebhooks.Webhook(hook.secret).verify(body, headers) == {"event": "x"}
    assert Delivery.objects.get().last_result == "status 200"
    assert send_due_messages() == 0


def test_the_signature_covers_body_id_time_and_secret(listener, alice):
    hook = add_webhook(alice, listener["url"])
    enqueue_deliveries(alice, "{}")
    headers, body = send_again(listener)
    receiver = standardwebhooks.Webhook(hook.secret)
    earlier = str(int(headers["webhook-timestamp"]) - 1)
    for changed, altered_body in (
        ({}, body + " "),
        ({"webhook-id": "msg_1"}, body),
        ({"webhook-timestamp": earlier}, body),
    ):
        with pytest.raises(standardwebhooks.WebhookVerificationError):
            receiver.verify(altered_body, {**headers, **changed})
    with pytest.raises(standardwebhooks.WebhookVerificationError):
        standardwebhooks.Webhook(create_secret()).verify(body, headers)


def test_retries_keep_the_id_and_other_messages_have_their_own(listener, alice):
    listener["status"] = 500
    hook = add_webhook(alice, listener["url"])
    enqueue_deliveries(alice, "{}")
    first, second = (send_again(listener)[0]["webhook-id"] for _ in range(2))
    assert first == second
    Delivery.objects.all().delete()
    enqueue_deliveries(alice, "{}")
    headers, body = send_again(listener)
    assert headers["webhook-id"] != first
    standardwebhooks.Webhook(hook.secret).verify(body, headers)


def test_two_webhooks_of_one_receiver_never_share_an_id():
    one, other = (Delivery(pk=7, webhook=Webhook(secret=create_secret())) for _ in range(2))
    assert signed_headers(one, 1)["webhook-id"] != signed_headers(other, 1)["webhook-id"]


def test_an_old_secret_without_prefix_still_signs(listener, alice):
    hook = add_webhook(alice, listener["url"])
    hook.secret = "0123456789abcdef" * 3
    hook.save()
    enqueue_deliveries(alice, "{}")
    headers, body = send_again(listener)
    standardwebhooks.Webhook(hook.secret).verify(body, headers)


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/",
        "http://0.0.0.0/",
        "http://[::]/",
        "http://[::1]/",
        "http://[::ffff:127.0.0.1]/",
        "http://[64:ff9b::7f00:1]/",
        "http://[2002:7f00:1::]/",
        "http://[fec0::1]/",
        "http://2130706433/",
        "http://0x7f.1/",
        "http://017700000001/",
        "http://169.254.169.254/latest/meta-data",
        "http://10.0.0.1/",
        "http://192.168.1.1/",
        "http://100.64.0.1/",
        "http://224.0.0.1/",
        "http://localhost/",
        "http://localhost./",
        "http://user@198.51.100.1/",
        "http://127.0.0.1\\@example.com/",
        "http://example.com#@127.0.0.1/",
        "file:///etc/passwd",
        "gopher://127.0.0.1/",
        "ftp://198.51.100.1/",
        "//198.51.100.1/",
        "http://",
        "",
        "http://exa mple.com/",
        "http://example.com/\r\nX: y",
        "http://" + "a" * 600 + ".com/",
    ],
)
def test_an_address_that_is_not_public_is_rejected(alice, url):
    with pytest.raises(UnreachableAddress):
        add_webhook(alice, url)


def test_the_connection_uses_the_address_that_was_checked(listener, alice, monkeypatch):
    add_webhook(alice, listener["url"])
    enqueue_deliveries(alice, "{}")
    resolved_hosts, real = [], webhooks.socket.getaddrinfo
    monkeypatch.setattr(
        webhooks.socket,
        "getaddrinfo",
        lambda host, *a, **k: resolved_hosts.append(host) or real(host, *a, **k),
    )
    send_due_messages()
    # The connection itself resolves only the IP address.
    assert resolved_hosts.count("localhost") == 1
    assert len(listener["requests"]) == 1


def test_a_host_that_becomes_private_gets_nothing(alice, monkeypatch):
    monkeypatch.setattr(
        webhooks.socket, "getaddrinfo", lambda *_a, **_k: [(0, 0, 0, "", ("8.8.8.8", 0))]
    )
    add_webhook(alice, "https://hooks.example.com/x")
    enqueue_deliveries(alice, "{}")
    monkeypatch.setattr(
        webhooks.socket, "getaddrinfo", lambda *_a, **_k: [(0, 0, 0, "", ("192.168.0.9", 0))]
    )
    send_due_messages()
    assert "no public IP address" in Delivery.objects.get().last_result


def test_redirects_are_not_followed_and_failures_are_retried_up_to_a_limit(listener, alice):
    listener["status"] = 302
    add_webhook(alice, listener["url"])
    enqueue_deliveries(alice, "{}")
    for tries in range(1, 6):
        Job.objects.update(run_after=timezone.now() - timedelta(seconds=1))
        assert send_due_messages() == 1
        assert Delivery.objects.get().tries == tries
    delivery = Delivery.objects.get()
    assert (delivery.last_result, Job.objects.get().state) == ("status 302", "failed")
    assert len(listener["requests"]) == 5


def test_the_end_of_a_run_sends_one_message(listener, run, alice):
    from training.runs.actions import stop_run

    add_webhook(alice, listener["url"])
    stop_run(run, discard=True)
    assert send_due_messages() == 1
    payload = json.loads(listener["requests"][0][2])
    assert (payload["event"], payload["run"]["name"], payload["run"]["state"]) == (
        "run.ended",
        "Lights, tiny",
        "cancelled",
    )


def test_users_cannot_see_or_remove_each_others_webhooks(listener, alice, client, people):
    hook = add_webhook(alice, listener["url"])
    client.force_login(people["bob"])
    assert hook.secret not in client.get("/account").content.decode()
    assert client.post(f"/account/webhooks/{hook.pk}/remove").status_code == 404
    client.force_login(alice)
    client.post(f"/account/webhooks/{hook.pk}/remove")
    assert alice.webhooks.count() == 0


def test_a_slow_response_is_ended_by_the_timeout(settings, alice, monkeypatch):
    import socket
    import time

    server = socket.create_server(("127.0.0.1", 0))
    settings.WEBHOOK_HOSTS = ["localhost"]
    monkeypatch.setattr(webhooks, "TIMEOUT_SECONDS", 1.0)

    def send_slowly():
        connection, _ = server.accept()
        connection.send(b"HTTP/1.1 200 OK\r\n")
        for number in range(100):
            try:
                connection.send(b"X-%d: y\r\n" % number)
            except OSError:
                return
            time.sleep(0.3)

    threading.Thread(target=send_slowly, daemon=True).start()
    add_webhook(alice, f"http://localhost:{server.getsockname()[1]}/")
    enqueue_deliveries(alice, "{}")
    started = time.monotonic()
    send_due_messages()
    assert time.monotonic() - started < 5
    assert Delivery.objects.get().last_result == "no response within 1 s"
