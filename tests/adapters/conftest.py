"""What every test of the adapters' room needs."""

import pytest

from adapters import jobs


@pytest.fixture(autouse=True)
def no_second_voice(monkeypatch):
    """A test's one transaction holds SQLite's lock: a beat from beside it would wait 20 s for
    that.
    """
    monkeypatch.setattr(jobs, "BEAT_SECONDS", 600.0)
