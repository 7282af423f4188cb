"""Helpers for page tests: the URLs of the site, and their HTML."""

import re

from django.urls import get_resolver
from django.urls.resolvers import RoutePattern


def normalize_markup(page):
    """The HTML without insignificant whitespace: attributes are separated by one space."""
    text = page if isinstance(page, str) else page.content.decode()
    return re.sub(r"(?<=>) | (?=<)", "", re.sub(r"\s+", " ", text))


def list_routes(patterns=None, prefix="/"):
    """Every route of pages, API and admin site, as `/runs/<int:run_id>`; the admin site's regular
    expressions are left out.
    """
    for pattern in get_resolver().url_patterns if patterns is None else patterns:
        route = prefix + str(pattern.pattern)
        if hasattr(pattern, "url_patterns"):
            yield from list_routes(pattern.url_patterns, route)
        elif isinstance(pattern.pattern, RoutePattern):
            yield route


def fill_route(route, values):
    """The URL of a route; a parameter without a value is 1."""
    return re.sub(r"<(?:\w+:)?(\w+)>", lambda match: str(values.get(match[1], 1)), route)
