"""A test has the same name in every process: pytest-xdist deals tests out by name, and stops where two collections differ."""

import re


def test_no_test_is_named_by_the_bytes_that_it_reads(request):
    unsteady = [item.nodeid for item in request.session.items if re.search(r"\\x[0-9a-f]{2}|0x[0-9a-f]{6}", item.nodeid)]
    assert not unsteady
