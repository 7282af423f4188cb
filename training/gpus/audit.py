"""The audit log: append-only, and each entry has the SHA-256 digest of the previous one, so that
tampering can be detected.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from typing import Any

from django.db import connection, transaction
from django.utils import timezone

from training.errors import to_one_line
from training.gpus.models import AuditEntry
from training.people.models import Team, User

SCHEDULER = "scheduler"


def record_entry(
    actor: User | None,
    action: str,
    subject: str,
    *,
    team: Team | None = None,
    change: tuple[dict[str, Any], dict[str, Any]] = ({}, {}),
    reason: str = "",
) -> AuditEntry:
    """Add an entry. `change` has the values before and after."""
    before, after = change
    with transaction.atomic():
        acquire_advisory_lock("audit")
        last_digest = (
            AuditEntry.objects.order_by("-pk").values_list("digest", flat=True).first() or ""
        )
        entry = AuditEntry(
            at=timezone.now(),
            actor=actor,
            actor_name=actor.username if actor else SCHEDULER,
            action=action,
            subject=subject[:200],
            team=team,
            before=before,
            after=after,
            reason=to_one_line(reason)[:300],
            previous=last_digest,
        )
        entry.digest = compute_digest(entry)
        entry.save()
    return entry


def compute_digest(entry: AuditEntry) -> str:
    fields = [
        entry.previous,
        entry.at.isoformat(),
        entry.actor_name,
        entry.action,
        entry.subject,
        entry.before,
        entry.after,
        entry.reason,
    ]
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def find_tampered_entry() -> AuditEntry | None:
    """The first entry that was altered or whose predecessor is missing, or None."""
    previous = ""
    for entry in AuditEntry.objects.order_by("pk").iterator():
        if entry.previous != previous or entry.digest != compute_digest(entry):
            return entry
        previous = entry.digest
    return None


def acquire_advisory_lock(lock_name: str) -> None:
    """Serialize transactions that use the same name, until this one ends.

    PostgreSQL needs the lock. On SQLite, IMMEDIATE transactions are serial anyway.
    """
    if connection.vendor == "postgresql":
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_advisory_xact_lock(%s)", [zlib.crc32(lock_name.encode())])
