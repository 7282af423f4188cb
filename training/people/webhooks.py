"""Messages to people's own addresses: signed, and sent only to where the whole world could send them, too.

The name is resolved once and the connection goes to that very address, so a name that changes its answer (DNS rebinding) gains
nothing; redirects are not followed, no proxy is used, and the answer is read up to a limit of bytes and seconds.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import logging
import secrets
import socket
import time
from datetime import timedelta

import httpx
from django.conf import settings
from django.db.models import F
from django.utils import timezone

from training.errors import NotFound, TooLarge, UserError
from training.people.models import Delivery, User, Webhook

MOST_WEBHOOKS = 5
TRIES_AFTER_SECONDS = (10, 60, 600, 3600)
SECONDS = 10.0
MOST_ANSWER_BYTES = 64_000
KEPT_DELIVERIES = 20
log = logging.getLogger("snapml.webhooks")


class Unreachable(UserError):
    """An address to which nothing is sent."""


def add_webhook(user: User, url: str) -> Webhook:
    """Raises Unreachable: not an address on the open internet; TooLarge: there are enough."""
    if user.webhooks.count() >= MOST_WEBHOOKS:
        raise TooLarge(f"You have {MOST_WEBHOOKS} webhooks, which is the most; remove one first.", field="url")
    resolve(parse(url.strip()))
    return Webhook.objects.create(user=user, url=url.strip()[:500], secret=secrets.token_hex(24))


def remove_webhook(user: User, webhook_id: int) -> None:
    if not user.webhooks.filter(pk=webhook_id).delete()[0]:
        raise NotFound("There is no such webhook of yours.")


def parse(url: str) -> httpx.URL:
    """Raises Unreachable: not http(s), or with a user name, a fragment or odd characters in it."""
    if len(url) > 500 or not url.isascii() or any(c in url for c in "\\ \t\r\n\0"):
        raise Unreachable("The address must be a plain https:// address of at most 500 characters.", field="url")
    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, ValueError) as error:
        raise Unreachable(f"{url[:80]!r} is not an address.", field="url") from error
    if parsed.scheme not in ("http", "https") or not parsed.host or parsed.userinfo or parsed.fragment:
        raise Unreachable("The address must begin with https:// (or http://), with no user name and no #.", field="url")
    return parsed


def resolve(url: httpx.URL) -> str:
    """One address of the host, checked; hosts in WEBHOOK_HOSTS may be private.

    Raises:
        Unreachable: the name does not resolve, or to an address that is not open to the world.
    """
    try:
        found = {info[4][0] for info in socket.getaddrinfo(url.host, url.port or 443, type=socket.SOCK_STREAM)}
    except (OSError, UnicodeError) as error:
        raise Unreachable(f"{url.host} does not resolve to an address.", field="url") from error
    addresses = sorted(str(address) for address in found)
    if url.host not in settings.WEBHOOK_HOSTS:
        for address in addresses:
            if not is_open(address):
                raise Unreachable(
                    f"{url.host} is in a private network; an admin can allow it in SNAPML_WEBHOOK_HOSTS.", field="url"
                )
    return addresses[0]


def is_open(text: str) -> bool:
    """Is this an address of the open internet? Addresses that carry another one inside are judged by both."""
    address = ipaddress.ip_address(text.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour or (address.teredo[1] if address.teredo else None)
        if address in ipaddress.ip_network("64:ff9b::/96"):
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None and not is_open(str(inner)):
            return False
    return address.is_global and not address.is_multicast and not address.is_reserved


def queue_message(user: User, body: str) -> None:
    """Leave a message for every webhook of a person; workers send it."""
    now = timezone.now()
    Delivery.objects.bulk_create([Delivery(webhook=webhook, body=body, due_at=now) for webhook in user.webhooks.all()])


def send_due() -> int:
    """Send what is due; a worker's sweeper calls this. Each message is claimed first, so two workers never send it at once."""
    sent = 0
    for delivery in Delivery.objects.filter(due_at__lte=timezone.now()).select_related("webhook")[:20]:
        later = timezone.now() + timedelta(seconds=3 * SECONDS)
        if Delivery.objects.filter(pk=delivery.pk, due_at=delivery.due_at).update(due_at=later, tries=F("tries") + 1):
            deliver(delivery)
            sent += 1
    return sent


def deliver(delivery: Delivery) -> None:
    try:
        status = post(delivery.webhook, delivery.body)
        arrived, told = 200 <= status < 300, f"answered {status}"
    except (UserError, httpx.HTTPError, OSError) as error:
        arrived, told = False, str(error)[:300] or type(error).__name__
    tries = delivery.tries + 1
    wait = TRIES_AFTER_SECONDS[tries - 1] if tries <= len(TRIES_AFTER_SECONDS) else None
    due = None if arrived or wait is None else timezone.now() + timedelta(seconds=wait)
    Delivery.objects.filter(pk=delivery.pk).update(due_at=due, told=told)
    old = Delivery.objects.filter(webhook=delivery.webhook, due_at=None).values_list("pk", flat=True)[KEPT_DELIVERIES:]
    Delivery.objects.filter(pk__in=list(old)).delete()


def post(webhook: Webhook, body: str) -> int:
    """POST the body to the webhook's address as it resolves now; returns the status."""
    url = parse(webhook.url)
    address = resolve(url)
    began = time.monotonic()
    headers = {
        "Host": url.netloc.decode(),
        "Content-Type": "application/json",
        "User-Agent": "SnapML",
        "X-SnapML-Signature": signature(webhook.secret, body, int(time.time())),
    }
    target = url.copy_with(host=address)
    with httpx.Client(timeout=SECONDS, follow_redirects=False, trust_env=False) as client:
        request = client.build_request(
            "POST", target, content=body.encode(), headers=headers, extensions={"sni_hostname": url.host}
        )
        answer = client.send(request, stream=True)
        read = 0
        for piece in answer.iter_raw():
            read += len(piece)
            if read > MOST_ANSWER_BYTES or time.monotonic() - began > SECONDS:
                break
        answer.close()
    return answer.status_code


def signature(secret: str, body: str, now: int) -> str:
    """`t=<unix seconds>,v1=<hex>`: HMAC-SHA256 of "t.body", so that an old message cannot be sent again as a new one."""
    mac = hmac.new(secret.encode(), f"{now}.{body}".encode(), hashlib.sha256).hexdigest()
    return f"t={now},v1={mac}"
