"""A test has the same name in every process: pytest-xdist deals tests out by name, and stops where
two collections differ.
"""

import re


def test_no_test_is_named_by_the_bytes_that_it_reads(request):
    unsteady = [
        item.nodeid
        for item in request.session.items
        if re.search(r"\\x1f\\x8b| at 0x", item.nodeid)
    ]
    assert not unsteady
