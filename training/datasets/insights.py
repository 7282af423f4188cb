"""What stands in the rows: languages, lengths, labels, secrets and private addresses. The detecting
is done by libraries.
"""

from __future__ import annotations

import heapq
import re
from collections import Counter
from typing import Any

from training.datasets.rows import Row

MAX_LABELS = 50  # more different answers than this are no labels
LABEL_CHARACTERS = 100
LANGUAGE_CHARACTERS = 20  # shorter texts are guessed too badly to count
# From here on the language of every tenth row is looked at: it is half of the time
EVERY_ROW = 20_000
EXAMPLES = 20
EXTREMES = 5
# Of a row, for secrets and addresses: some patterns take the square of the length
JUDGED_CHARACTERS = 20_000
# Detectors that look for the form of a key. Those that guess by entropy or by the word "password"
# are left out: they would mark every hash and every sentence about passwords.
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
ADDRESS = re.compile(r"[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63}){1,5}")
# Addresses that belong to nobody, or to everybody.
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
    """Fed row by row, tells at the end. Only rows that can be used are fed."""

    def __init__(self) -> None:
        from detect_secrets.core.plugins.initialize import from_plugin_classname
        from detect_secrets.settings import transient_settings

        with transient_settings({"plugins_used": [{"name": name} for name in SECRET_DETECTORS]}):
            self.detectors: list[Any] = [from_plugin_classname(name) for name in SECRET_DETECTORS]
        self.languages: Counter[str] = Counter()
        self.labels: Counter[str] | None = Counter()
        self.secrets: list[dict[str, Any]] = []
        self.addresses: list[dict[str, Any]] = []
        self.counts: Counter[str] = Counter()
        self.longest: list[tuple[int, int, str]] = []
        self.shortest: list[tuple[int, int, str]] = []

    def add(self, place: str, row: Row, text: str) -> None:
        self.counts["rows"] += 1
        keep_extreme(self.longest, (len(text), -self.counts["rows"], place))
        keep_extreme(self.shortest, (-len(text), -self.counts["rows"], place))
        self.add_language(text)
        self.add_label(row)
        whole = row.to_json()[:JUDGED_CHARACTERS]  # system prompts and tools may hold them, too
        for kind in self.secrets_in(whole):
            self.note(self.secrets, "secrets", place, kind)
        if "@" in whole:
            for address in ADDRESS.findall(whole):
                if is_private(address):
                    self.note(self.addresses, "addresses", place, masked(address))

    def add_language(self, text: str) -> None:
        import py3langid

        sampled = self.counts["rows"] <= EVERY_ROW or self.counts["rows"] % 10 == 0
        if sampled and len(text) >= LANGUAGE_CHARACTERS:
            self.languages[py3langid.classify(text[:300])[0]] += 1

    def add_label(self, row: Row) -> None:
        if self.labels is None:
            return
        answer = row.messages[-1]["content"].strip() if row.messages else ""
        if not answer or len(answer) > LABEL_CHARACTERS:
            self.labels = None
            return
        self.labels[answer] += 1
        if len(self.labels) > MAX_LABELS:
            self.labels = None

    def secrets_in(self, text: str) -> list[str]:
        return sorted({d.secret_type for d in self.detectors for _ in d.analyze_string(text)})

    def note(self, into: list[dict[str, Any]], name: str, place: str, words: str) -> None:
        self.counts[name] += 1
        if len(into) < EXAMPLES:
            into.append({"place": place, "words": words})

    def told(self) -> dict[str, Any]:
        known = sum(self.languages.values())
        labels = (
            self.labels
            if self.labels and len(self.labels) > 1 and self.counts["rows"] >= 4 * len(self.labels)
            else {}
        )
        return {
            "languages": [
                {"name": name, "share": count / known}
                for name, count in self.languages.most_common(8)
                if count / known >= 0.01
            ],
            "labels": [
                {"words": words, "count": count} for words, count in Counter(labels).most_common()
            ],
            "secrets": {"count": self.counts["secrets"], "shown": self.secrets},
            "addresses": {"count": self.counts["addresses"], "shown": self.addresses},
            "longest": [
                {"place": place, "characters": size}
                for size, _, place in sorted(self.longest, reverse=True)
            ],
            "shortest": [
                {"place": place, "characters": -size}
                for size, _, place in sorted(self.shortest, reverse=True)
            ],
        }


def keep_extreme(heap: list[tuple[int, int, str]], item: tuple[int, int, str]) -> None:
    if len(heap) < EXTREMES:
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


def masked(address: str) -> str:
    """Enough to find it in the file, not enough to write to."""
    name, _, domain = address.rpartition("@")
    return f"{name[:2]}…@{domain}"
