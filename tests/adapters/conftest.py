"""What every test of the adapters' room needs."""

import pytest

from training.jobs import runner


@pytest.fixture(autouse=True)
def no_heartbeat(monkeypatch):
    """A test's one transaction holds SQLite's lock: a heartbeat from beside it would wait 20 s for
    that.
    """
    monkeypatch.setattr(runner, "HEARTBEAT_SECONDS", 600.0)
