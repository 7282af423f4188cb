"""Statistics of the rows: languages, lengths, labels, API keys and private e-mail addresses.
Libraries do the detection.
"""

from __future__ import annotations

import heapq
import re
from collections import Counter
from typing import Any

from training.datasets.rendered_text import SPECIAL_TOKENS
from training.datasets.rows import Row

MAX_LABELS = 50  # more distinct answers are not labels
MAX_LABEL_CHARACTERS = 100
MIN_LANGUAGE_CHARACTERS = 20  # language detection is unreliable below
# After this many rows only every tenth is classified; language detection is half of the time
LANGUAGE_SAMPLING_AFTER_ROWS = 20_000
MAX_EXAMPLES = 20
MAX_EXTREMES = 5
# Scanned for secrets and addresses per row; some patterns take quadratic time
MAX_SCANNED_CHARACTERS = 20_000
# Detectors for the format of a key. Those that judge by entropy or by the word "password" would
# report every hash and every sentence about passwords.
SECRET_DETECTORS = (
    "ArtifactoryDetector",
    "AWSKeyDetector",
    "AzureStorageKeyDetector",
    "BasicAuthDetector",
    "DiscordBotTokenDetector",
    "GitHubTokenDetector",
    "GitLabTokenDetector",
    "JwtTokenDetector",
    "MailchimpDetector",
    "NpmDetector",
    "OpenAIDetector",
    "PrivateKeyDetector",
    "PypiTokenDetector",
    "SendGridDetector",
    "SlackDetector",
    "SquareOAuthDetector",
    "StripeDetector",
    "TelegramBotTokenDetector",
    "TwilioKeyDetector",
)
EMAIL_PATTERN = re.compile(r"[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63}){1,5}")
# Addresses in example domains and of public mailboxes are not private
PUBLIC_DOMAINS = (
    "example.com",
    "example.org",
    "example.net",
    "test.com",
    "domain.com",
    "email.com",
    "localhost",
)
PUBLIC_NAMES = {
    "info",
    "support",
    "admin",
    "contact",
    "hello",
    "help",
    "noreply",
    "no-reply",
    "sales",
    "office",
    "user",
    "name",
}


class Insights:
    """Collects statistics from valid rows, one `add_row` per row; `to_dict` returns the result."""

    def __init__(self) -> None:
        from detect_secrets.core.plugins.initialize import from_plugin_classname
        from detect_secrets.settings import transient_settings

        with transient_settings({"plugins_used": [{"name": name} for name in SECRET_DETECTORS]}):
            self.detectors: list[Any] = [from_plugin_classname(name) for name in SECRET_DETECTORS]
        self.languages: Counter[str] = Counter()
        self.labels: Counter[str] | None = Counter()
        self.secrets: list[dict[str, Any]] = []
        self.addresses: list[dict[str, Any]] = []
        self.special_tokens: list[dict[str, Any]] = []
        self.counts: Counter[str] = Counter()
        self.longest: list[tuple[int, int, str]] = []
        self.shortest: list[tuple[int, int, str]] = []

    def add_row(self, location: str, row: Row, text: str) -> None:
        self.counts["rows"] += 1
        push_extreme(self.longest, (len(text), -self.counts["rows"], location))
        push_extreme(self.shortest, (-len(text), -self.counts["rows"], location))
        self.add_language(text)
        self.add_label(row)
        row_json = row.to_json()[:MAX_SCANNED_CHARACTERS]  # includes system prompts and tools
        for kind in self.find_secrets(row_json):
            self.record_finding(self.secrets, "secrets", location, kind)
        if special_token := SPECIAL_TOKENS.search(row_json):
            self.record_finding(self.special_tokens, "special_tokens", location, special_token[0])
        if "@" in row_json:
            for address in EMAIL_PATTERN.findall(row_json):
                if is_private(address):
                    self.record_finding(
                        self.addresses, "addresses", location, mask_address(address)
                    )

    def add_language(self, text: str) -> None:
        import py3langid

        is_sampled = (
            self.counts["rows"] <= LANGUAGE_SAMPLING_AFTER_ROWS or self.counts["rows"] % 10 == 0
        )
        if is_sampled and len(text) >= MIN_LANGUAGE_CHARACTERS:
            self.languages[py3langid.classify(text[:300])[0]] += 1

    def add_label(self, row: Row) -> None:
        if self.labels is None:
            return
        answer = row.messages[-1]["content"].strip() if row.messages else ""
        if not answer or len(answer) > MAX_LABEL_CHARACTERS:
            self.labels = None
            return
        self.labels[answer] += 1
        if len(self.labels) > MAX_LABELS:
            self.labels = None

    def find_secrets(self, text: str) -> list[str]:
        return sorted({d.secret_type for d in self.detectors for _ in d.analyze_string(text)})

    def record_finding(
        self, findings: list[dict[str, Any]], counter: str, location: str, description: str
    ) -> None:
        self.counts[counter] += 1
        if len(findings) < MAX_EXAMPLES:
            findings.append({"location": location, "description": description})

    def to_dict(self) -> dict[str, Any]:
        total = sum(self.languages.values())
        labels = (
            self.labels
            if self.labels and len(self.labels) > 1 and self.counts["rows"] >= 4 * len(self.labels)
            else {}
        )
        return {
            "languages": [
                {"name": name, "share": count / total}
                for name, count in self.languages.most_common(8)
                if count / total >= 0.01
            ],
            "labels": [
                {"label": label, "count": count} for label, count in Counter(labels).most_common()
            ],
            "secrets": {"count": self.counts["secrets"], "examples": self.secrets},
            "addresses": {"count": self.counts["addresses"], "examples": self.addresses},
            "special_tokens": {
                "count": self.counts["special_tokens"],
                "examples": self.special_tokens,
            },
            "longest": [
                {"location": location, "characters": size}
                for size, _, location in sorted(self.longest, reverse=True)
            ],
            "shortest": [
                {"location": location, "characters": -size}
                for size, _, location in sorted(self.shortest, reverse=True)
            ],
        }


def push_extreme(heap: list[tuple[int, int, str]], item: tuple[int, int, str]) -> None:
    if len(heap) < MAX_EXTREMES:
        heapq.heappush(heap, item)
    elif item > heap[0]:
        heapq.heapreplace(heap, item)


def is_private(address: str) -> bool:
    from email_validator import EmailNotValidError, validate_email

    name, _, domain = address.rpartition("@")
    if name.lower() in PUBLIC_NAMES or any(
        f".{domain.lower()}".endswith(f".{known}") for known in PUBLIC_DOMAINS
    ):
        return False
    try:
        validate_email(address, check_deliverability=False)
    except EmailNotValidError:
        return False
    return True


def mask_address(address: str) -> str:
    """Enough of an address to find it in the file, too little to write to it."""
    name, _, domain = address.rpartition("@")
    return f"{name[:2]}…@{domain}"
