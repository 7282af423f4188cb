"""Webhooks: messages to users' own URLs, signed as the Standard Webhooks specification
(standardwebhooks.com) defines, and sent only to public addresses.

The host is resolved once and the connection uses that address, which makes DNS rebinding useless.
Redirects are not followed, no proxy is used, and only the status of the response is read.
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
from django.db import transaction
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
MAX_WAITING_DELIVERIES = 100  # per webhook
MAX_CONCURRENT = 20
MAX_STORED_DELIVERIES = 20
SECRET_PREFIX = "whsec_"  # noqa: S105  a prefix, not a secret


class UnreachableAddress(UserError):
    """A URL to which nothing may be sent."""


def add_webhook(user: User, url: str) -> Webhook:
    """Raises UnreachableAddress: not a public address. TooLarge: the user has MAX_WEBHOOKS."""
    resolve_host(parse_url(url.strip()))
    with transaction.atomic():
        User.objects.select_for_update().get(pk=user.pk)  # serializes the count of the webhooks
        if user.webhooks.count() >= MAX_WEBHOOKS:
            raise TooLarge(
                f"You already have {MAX_WEBHOOKS} webhooks, the maximum. Remove one first.",
                field="url",
            )
        return Webhook.objects.create(user=user, url=url.strip()[:500], secret=create_secret())


def remove_webhook(user: User, webhook_id: int) -> None:
    if not user.webhooks.filter(pk=webhook_id).delete()[0]:
        raise NotFound(f"Webhook {webhook_id} not found.")


def parse_url(url: str) -> httpx.URL:
    """Raises UnreachableAddress: not a plain http(s) URL without user name and fragment."""
    if len(url) > 500 or not url.isascii() or any(c in url for c in "\\ \t\r\n\0"):
        raise UnreachableAddress(
            "The URL must have at most 500 ASCII characters, without spaces or backslashes.",
            field="url",
        )
    try:
        parsed = httpx.URL(url)
        host = parsed.host  # decodes it: `xn--` is no name
    except (httpx.InvalidURL, ValueError) as error:
        raise UnreachableAddress(f"{url[:80]!r} is not a valid URL.", field="url") from error
    if parsed.scheme not in ("http", "https") or not host or parsed.userinfo or parsed.fragment:
        raise UnreachableAddress(
            "The URL must start with https:// or http:// and have no user name and no #.",
            field="url",
        )
    return parsed


def resolve_host(url: httpx.URL) -> str:
    """An IP address of the host. It must be public, unless the host is in WEBHOOK_HOSTS.

    Raises:
        UnreachableAddress: the name does not resolve, or not only to public addresses.
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
    """One message for unknown and private hosts, so that it reveals no names of this network."""
    return (
        f"{url.host} has no public IP address. An admin can allow a private host in "
        "SNAPML_WEBHOOK_HOSTS."
    )


def is_public_address(text: str) -> bool:
    """Whether this is a public IP address. An IPv4 address inside it must be public too."""
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
    """Enqueue a message for every webhook of an active user. A webhook with too many waiting
    messages gets none.
    """
    for webhook in user.webhooks.filter(user__is_active=True):
        if count_waiting_deliveries(webhook) < MAX_WAITING_DELIVERIES:
            delivery = Delivery.objects.create(webhook=webhook, body=body)
            enqueue_job(user, KIND, str(delivery.pk), subjects=[delivery])


def count_waiting_deliveries(webhook: Webhook) -> int:
    return webhook.deliveries.filter(pk__in=open_deliveries()).count()


def open_deliveries() -> QuerySet[JobSubject, int]:
    """The ids of messages that are neither delivered nor given up."""
    subjects = JobSubject.objects.filter(job__kind=KIND, job__state__in=OPEN_STATES)
    return subjects.values_list("object_id", flat=True)


def deliver_message(job: Job) -> dict[str, Any]:
    """Try to send a message.

    Raises:
        RetryLater: it failed and will be tried again.
        UserError: it failed for the last time.
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
    """Delete all finished messages of the webhook but the newest MAX_STORED_DELIVERIES."""
    delivery = get_subject(job, Delivery)
    assert delivery is not None
    ended = Delivery.objects.filter(webhook=delivery.webhook_id).exclude(pk__in=open_deliveries())
    for old in ended[MAX_STORED_DELIVERIES:]:
        old.delete()


async def send_delivery(delivery: Delivery) -> tuple[bool, str]:
    """Whether the message was accepted, and a description of the outcome. TIMEOUT_SECONDS limits
    the whole exchange, however slowly the server responds.
    """
    try:
        status = await asyncio.wait_for(post_delivery(delivery), TIMEOUT_SECONDS)
    except TimeoutError:
        return False, f"no response within {TIMEOUT_SECONDS:g} s"
    except (UserError, httpx.HTTPError, OSError) as error:
        return False, str(error) or type(error).__name__
    return 200 <= status < 300, f"status {status}"


async def post_delivery(delivery: Delivery) -> int:
    """POST the body to the address that the webhook's host has now. Returns the status and does not
    read the response's body.
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
    """Id, timestamp and signature as in the Standard Webhooks specification.

    Every try of a delivery has the same id, so that the receiver can detect duplicates. The
    timestamp is signed, so that an old message cannot be replayed.
    """
    key = base64.b64decode(delivery.webhook.secret.removeprefix(SECRET_PREFIX))
    # Derived from the secret: two installations with one receiver may use the same row ids.
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
