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
from typing import Any

import httpx
from django.conf import settings
from django.db.models import QuerySet

from training.errors import NotFound, TooLarge, UserError
from training.jobs.kinds import JobKind, Lane
from training.jobs.models import OPEN_STATES, Job, JobSubject
from training.jobs.runner import RetryLater, get_subject
from training.jobs.services import enqueue_job
from training.people.models import User
from training.webhooks.models import Delivery, Webhook

KIND = "webhook"
MAX_WEBHOOKS = 5
RETRY_DELAYS_SECONDS = (10, 60, 600, 3600)
TIMEOUT_SECONDS = 10.0
MAX_WAITING_DELIVERIES = 100  # messages of one webhook
MAX_CONCURRENT = 20
MAX_STORED_DELIVERIES = 20
SECRET_PREFIX = "whsec_"  # noqa: S105  the prefix of each, not one


class UnreachableAddress(UserError):
    """An address to which nothing is sent."""


def add_webhook(user: User, url: str) -> Webhook:
    """Raises Unreachable: not an address on the open internet; TooLarge: there are enough."""
    if user.webhooks.count() >= MAX_WEBHOOKS:
        raise TooLarge(
            f"You have {MAX_WEBHOOKS} webhooks, which is the most; remove one first.", field="url"
        )
    resolve_host(parse_url(url.strip()))
    return Webhook.objects.create(user=user, url=url.strip()[:500], secret=create_secret())


def remove_webhook(user: User, webhook_id: int) -> None:
    if not user.webhooks.filter(pk=webhook_id).delete()[0]:
        raise NotFound("There is no such webhook of yours.")


def parse_url(url: str) -> httpx.URL:
    """Raises Unreachable: not http(s), or with a user name, a fragment or odd characters in it."""
    if len(url) > 500 or not url.isascii() or any(c in url for c in "\\ \t\r\n\0"):
        raise UnreachableAddress(
            "The address must be a plain https:// address of at most 500 characters.", field="url"
        )
    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, ValueError) as error:
        raise UnreachableAddress(f"{url[:80]!r} is not an address.", field="url") from error
    if (
        parsed.scheme not in ("http", "https")
        or not parsed.host
        or parsed.userinfo
        or parsed.fragment
    ):
        raise UnreachableAddress(
            "The address must begin with https:// (or http://), with no user name and no #.",
            field="url",
        )
    return parsed


def resolve_host(url: httpx.URL) -> str:
    """One address of the host, checked; hosts in WEBHOOK_HOSTS may be private.

    Raises:
        Unreachable: the name does not resolve, or to an address that is not open to the world.
    """
    try:
        raw_addresses = {
            info[4][0]
            for info in socket.getaddrinfo(url.host, url.port or 443, type=socket.SOCK_STREAM)
        }
    except (OSError, UnicodeError) as error:
        raise UnreachableAddress(private_address_message(url), field="url") from error
    addresses = sorted(str(address) for address in raw_addresses)
    if url.host not in settings.WEBHOOK_HOSTS and not all(map(is_public_address, addresses)):
        raise UnreachableAddress(private_address_message(url), field="url")
    return addresses[0]


def private_address_message(url: httpx.URL) -> str:
    """One sentence for both, so that nobody learns which names this network knows."""
    return (
        f"{url.host} has no address on the open internet; an admin can allow a private one in "
        "SNAPML_WEBHOOK_HOSTS."
    )


def is_public_address(text: str) -> bool:
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
        if address.is_site_local or (inner is not None and not is_public_address(str(inner))):
            return False
    return address.is_global and not address.is_multicast and not address.is_reserved


def enqueue_deliveries(user: User, body: str) -> None:
    """Leave a message for every webhook of an active person; workers send it. Of those that wait
    the oldest go first.
    """
    for webhook in user.webhooks.filter(user__is_active=True):
        if count_waiting_deliveries(webhook) < MAX_WAITING_DELIVERIES:
            delivery = Delivery.objects.create(webhook=webhook, body=body)
            enqueue_job(user, KIND, str(delivery.pk), subjects=[delivery])


def count_waiting_deliveries(webhook: Webhook) -> int:
    return webhook.deliveries.filter(pk__in=open_deliveries()).count()


def open_deliveries() -> QuerySet[JobSubject, int]:
    """The ids of messages that have neither arrived nor failed too often."""
    subjects = JobSubject.objects.filter(job__kind=KIND, job__state__in=OPEN_STATES)
    return subjects.values_list("object_id", flat=True)


def deliver_message(job: Job) -> dict[str, Any]:
    """Send a message once.

    Raises:
        RetryLater: it did not arrive, and is sent again.
        UserError: it did not arrive, too often.
    """
    delivery = get_subject(job, Delivery, "webhook")
    assert delivery is not None
    has_arrived, result = asyncio.run(send_delivery(delivery))
    Delivery.objects.filter(pk=delivery.pk).update(tries=job.tries, last_result=result[:300])
    if has_arrived:
        return {}
    if job.tries > len(RETRY_DELAYS_SECONDS):
        raise UserError(result)
    raise RetryLater(RETRY_DELAYS_SECONDS[job.tries - 1])


def prune_deliveries(job: Job, _end: object) -> None:
    """Of the messages that have come to an end the newest are kept."""
    delivery = get_subject(job, Delivery)
    assert delivery is not None
    ended = Delivery.objects.filter(webhook=delivery.webhook_id).exclude(pk__in=open_deliveries())
    for old in ended[MAX_STORED_DELIVERIES:]:
        old.delete()


async def send_delivery(delivery: Delivery) -> tuple[bool, str]:
    """Did it arrive, and what was answered. However slowly an address answers, SECONDS are all it
    gets.
    """
    try:
        status = await asyncio.wait_for(post_delivery(delivery), TIMEOUT_SECONDS)
    except TimeoutError:
        return False, f"no answer within {TIMEOUT_SECONDS:g} s"
    except (UserError, httpx.HTTPError, OSError) as error:
        return False, str(error) or type(error).__name__
    return 200 <= status < 300, f"answered {status}"


async def post_delivery(delivery: Delivery) -> int:
    """POST the body to the webhook's address as it resolves now; returns the status. The answer's
    body is not read.
    """
    url = parse_url(delivery.webhook.url)
    address = await asyncio.to_thread(resolve_host, url)
    headers = {
        "Host": url.netloc.decode(),
        "Content-Type": "application/json",
        "User-Agent": "SnapML",
        **signed_headers(delivery, int(time.time())),
    }
    target, sni = url.copy_with(host=address), {"sni_hostname": url.host}
    async with httpx.AsyncClient(
        timeout=TIMEOUT_SECONDS, follow_redirects=False, trust_env=False
    ) as client:
        request = client.build_request(
            "POST", target, content=delivery.body.encode(), headers=headers, extensions=sni
        )
        response = await client.send(request, stream=True)
        await response.aclose()
    return response.status_code


def signed_headers(delivery: Delivery, timestamp: int) -> dict[str, str]:
    """Id, time and signature as the Standard Webhooks specification has them. The id is the same at
    every try of a delivery, so that a receiver can tell a repeat; the time is part of what is
    signed, so that an old message cannot be sent again as a new one.
    """
    key = base64.b64decode(delivery.webhook.secret.removeprefix(SECRET_PREFIX))
    # Keyed, because two installations with one receiver count their deliveries alike.
    message_id = f"msg_{sign_content(key, str(delivery.pk)).hex()[:32]}"
    signature = base64.b64encode(
        sign_content(key, f"{message_id}.{timestamp}.{delivery.body}")
    ).decode()
    return {
        "webhook-id": message_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": f"v1,{signature}",
    }


def sign_content(key: bytes, content: str) -> bytes:
    return hmac.digest(key, content.encode(), hashlib.sha256)


def create_secret() -> str:
    return SECRET_PREFIX + base64.b64encode(secrets.token_bytes(32)).decode()


WEBHOOK_JOB = JobKind(
    KIND,
    deliver_message,
    lane=Lane("webhooks", size=MAX_CONCURRENT),
    subjects=(Delivery,),
    max_tries=None,  # RETRY_DELAYS_SECONDS is the limit
    on_done=prune_deliveries,
    on_failed=prune_deliveries,
)
