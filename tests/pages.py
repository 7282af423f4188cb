"""Pages as a browser reads them."""

import re


def normalize_markup(page):
    """A page without the whitespace that a browser does not show, attributes one blank apart."""
    text = page if isinstance(page, str) else page.content.decode()
    return re.sub(r"(?<=>) | (?=<)", "", re.sub(r"\s+", " ", text))
