"""HTML helpers for page tests."""

import re


def normalize_markup(page):
    """The HTML without insignificant whitespace: attributes are separated by one space."""
    text = page if isinstance(page, str) else page.content.decode()
    return re.sub(r"(?<=>) | (?=<)", "", re.sub(r"\s+", " ", text))
