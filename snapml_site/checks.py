"""Django system checks for problems that would only show up later."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from django.conf import settings
from django.core.checks import CheckMessage, Error, Warning, register

# package, lowest version, why
MIN_VERSIONS = (
    ("daphne", (4, 2, 2), "CVE-2026-44545 and CVE-2026-44546"),
    ("torch", (2, 10), "CVE-2026-24747"),
    ("transformers", (5, 3), "CVE-2026-4372"),
    ("peft", (0, 21), "adapter configs could name modules to import"),
    ("huey", (3, 5, 4), "locked database at first open, hang at shutdown"),
)


@register()
def check_versions(**_kwargs: Any) -> list[CheckMessage]:
    errors: list[CheckMessage] = []
    for name, min_version, why in MIN_VERSIONS:
        parts = tuple(int(part) for part in version(name).split("+")[0].split(".")[:3])
        if parts < min_version:
            lowest = ".".join(map(str, min_version))
            errors.append(
                Error(
                    f"{name} {version(name)} is older than {lowest} ({why}).",
                    hint="`make run` installs the pinned versions.",
                    id="snapml.E001",
                )
            )
    return errors


@register()
def check_single_host(**_kwargs: Any) -> list[CheckMessage]:
    if settings.REDIS_URL and not settings.DATABASE_URL:
        return [
            Warning(
                "REDIS_URL is set, but the database is an SQLite file, which serves one host only.",
                hint="Set DATABASE_URL to PostgreSQL for several hosts, or leave REDIS_URL out.",
                id="snapml.W001",
            )
        ]
    return []


@register(deploy=True)
def check_https(**_kwargs: Any) -> list[CheckMessage]:
    if not settings.HTTPS:
        return [
            Warning(
                "Cookies are sent unencrypted.",
                hint="Put a TLS proxy in front of SnapML and set SNAPML_HTTPS=1.",
                id="snapml.W002",
            )
        ]
    return []
