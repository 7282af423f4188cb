"""Messages to people's own addresses: signed as the Standard Webhooks specification
(standardwebhooks.com) has it, and sent only to where the whole world could send them, too.

The name is resolved once and the connection goes to that very address, so a name that changes its
answer (DNS rebinding) gains nothing; redirects are not followed, no proxy is used, and of the
answer only the status is read.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import ipaddress
import secrets
import socket
import time
from collections.abc import Sequence
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
MOST_WAITING = 100  # messages of one webhook
AT_ONCE = 20
KEPT_DELIVERIES = 20
SECRET_PREFIX = "whsec_"  # noqa: S105  the prefix of each, not one


class Unreachable(UserError):
    """An address to which nothing is sent."""


def add_webhook(user: User, url: str) -> Webhook:
    """Raises Unreachable: not an address on the open internet; TooLarge: there are enough."""
    if user.webhooks.count() >= MOST_WEBHOOKS:
        raise TooLarge(
            f"You have {MOST_WEBHOOKS} webhooks, which is the most; remove one first.", field="url"
        )
    resolve(parse(url.strip()))
    return Webhook.objects.create(user=user, url=url.strip()[:500], secret=create_secret())


def remove_webhook(user: User, webhook_id: int) -> None:
    if not user.webhooks.filter(pk=webhook_id).delete()[0]:
        raise NotFound("There is no such webhook of yours.")


def parse(url: str) -> httpx.URL:
    """Raises Unreachable: not http(s), or with a user name, a fragment or odd characters in it."""
    if len(url) > 500 or not url.isascii() or any(c in url for c in "\\ \t\r\n\0"):
        raise Unreachable(
            "The address must be a plain https:// address of at most 500 characters.", field="url"
        )
    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, ValueError) as error:
        raise Unreachable(f"{url[:80]!r} is not an address.", field="url") from error
    if (
        parsed.scheme not in ("http", "https")
        or not parsed.host
        or parsed.userinfo
        or parsed.fragment
    ):
        raise Unreachable(
            "The address must begin with https:// (or http://), with no user name and no #.",
            field="url",
        )
    return parsed


def resolve(url: httpx.URL) -> str:
    """One address of the host, checked; hosts in WEBHOOK_HOSTS may be private.

    Raises:
        Unreachable: the name does not resolve, or to an address that is not open to the world.
    """
    try:
        found = {
            info[4][0]
            for info in socket.getaddrinfo(url.host, url.port or 443, type=socket.SOCK_STREAM)
        }
    except (OSError, UnicodeError) as error:
        raise Unreachable(closed(url), field="url") from error
    addresses = sorted(str(address) for address in found)
    if url.host not in settings.WEBHOOK_HOSTS and not all(map(is_open, addresses)):
        raise Unreachable(closed(url), field="url")
    return addresses[0]


def closed(url: httpx.URL) -> str:
    """One sentence for both, so that nobody learns which names this network knows."""
    return (
        f"{url.host} has no address on the open internet; an admin can allow a private one in "
        "SNAPML_WEBHOOK_HOSTS."
    )


def is_open(text: str) -> bool:
    """Is this an address of the open internet? Addresses that carry another one inside are judged
    by both.
    """
    address = ipaddress.ip_address(text.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        inner = (
            address.ipv4_mapped
            or address.sixtofour
            or (address.teredo[1] if address.teredo else None)
        )
        if address in ipaddress.ip_network("64:ff9b::/96"):
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if address.is_site_local or (inner is not None and not is_open(str(inner))):
            return False
    return address.is_global and not address.is_multicast and not address.is_reserved


def queue_message(user: User, body: str) -> None:
    """Leave a message for every webhook of an active person; workers send it. Of those that wait
    the oldest go first.
    """
    now = timezone.now()
    for webhook in user.webhooks.filter(user__is_active=True):
        if webhook.deliveries.exclude(due_at=None).count() < MOST_WAITING:
            Delivery.objects.create(webhook=webhook, body=body, due_at=now)


def send_due() -> int:
    """Send what is due, several at once; a worker calls this over and over. A message is claimed
    first, so only one sends it.
    """
    claimed = []
    for delivery in (
        Delivery.objects.filter(due_at__lte=timezone.now())
        .select_related("webhook")
        .order_by("due_at")[:AT_ONCE]
    ):
        later = timezone.now() + timedelta(seconds=3 * SECONDS)
        if Delivery.objects.filter(pk=delivery.pk, due_at=delivery.due_at).update(
            due_at=later, tries=F("tries") + 1
        ):
            claimed.append(delivery)
    for delivery, (arrived, told) in zip(claimed, asyncio.run(send_all(claimed)), strict=True):
        note(delivery, arrived, told)
    return len(claimed)


def note(delivery: Delivery, arrived: bool, told: str) -> None:
    tries = delivery.tries + 1
    wait = TRIES_AFTER_SECONDS[tries - 1] if tries <= len(TRIES_AFTER_SECONDS) else None
    due = None if arrived or wait is None else timezone.now() + timedelta(seconds=wait)
    Delivery.objects.filter(pk=delivery.pk).update(due_at=due, told=told[:300])
    old = Delivery.objects.filter(webhook=delivery.webhook, due_at=None).values_list(
        "pk", flat=True
    )[KEPT_DELIVERIES:]
    Delivery.objects.filter(pk__in=list(old)).delete()


async def send_all(deliveries: Sequence[Delivery]) -> list[tuple[bool, str]]:
    return list(await asyncio.gather(*(send(delivery) for delivery in deliveries)))


async def send(delivery: Delivery) -> tuple[bool, str]:
    """Did it arrive, and what was answered. However slowly an address answers, SECONDS are all it
    gets.
    """
    try:
        status = await asyncio.wait_for(post(delivery), SECONDS)
    except TimeoutError:
        return False, f"no answer within {SECONDS:g} s"
    except (UserError, httpx.HTTPError, OSError) as error:
        return False, str(error) or type(error).__name__
    return 200 <= status < 300, f"answered {status}"


async def post(delivery: Delivery) -> int:
    """POST the body to the webhook's address as it resolves now; returns the status. The answer's
    body is not read.
    """
    url = parse(delivery.webhook.url)
    address = await asyncio.to_thread(resolve, url)
    headers = {
        "Host": url.netloc.decode(),
        "Content-Type": "application/json",
        "User-Agent": "SnapML",
        **signed_headers(delivery, int(time.time())),
    }
    target, sni = url.copy_with(host=address), {"sni_hostname": url.host}
    async with httpx.AsyncClient(
        timeout=SECONDS, follow_redirects=False, trust_env=False
    ) as client:
        request = client.build_request(
            "POST", target, content=delivery.body.encode(), headers=headers, extensions=sni
        )
        answer = await client.send(request, stream=True)
        await answer.aclose()
    return answer.status_code


def signed_headers(delivery: Delivery, timestamp: int) -> dict[str, str]:
    """Id, time and signature as the Standard Webhooks specification has them. The id is the same at
    every try of a delivery, so that a receiver can tell a repeat; the time is part of what is
    signed, so that an old message cannot be sent again as a new one.
    """
    key = base64.b64decode(delivery.webhook.secret.removeprefix(SECRET_PREFIX))
    # Keyed, because two installations with one receiver count their deliveries alike.
    message_id = f"msg_{sign(key, str(delivery.pk)).hex()[:32]}"
    signature = base64.b64encode(sign(key, f"{message_id}.{timestamp}.{delivery.body}")).decode()
    return {
        "webhook-id": message_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": f"v1,{signature}",
    }


def sign(key: bytes, content: str) -> bytes:
    return hmac.digest(key, content.encode(), hashlib.sha256)


def create_secret() -> str:
    return SECRET_PREFIX + base64.b64encode(secrets.token_bytes(32)).decode()
