"""Tests have the same ids in every process: pytest-xdist distributes tests by id, and stops if the
collections differ.
"""

import re


def test_no_test_id_contains_bytes_or_memory_addresses(request):
    unsteady = [
        item.nodeid
        for item in request.session.items
        if re.search(r"\\x1f\\x8b| at 0x", item.nodeid)
    ]
    assert not unsteady
