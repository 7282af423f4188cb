"""Pages as a browser reads them."""

import re


def markup(answer):
    """A page without the whitespace that a browser does not show, attributes one blank apart."""
    text = answer if isinstance(answer, str) else answer.content.decode()
    return re.sub(r"(?<=>) | (?=<)", "", re.sub(r"\s+", " ", text))
