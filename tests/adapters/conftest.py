"""Fixtures for all tests of adapters."""

import pytest

from training.jobs import runner


@pytest.fixture(autouse=True)
def no_heartbeat(monkeypatch):
    """A test's transaction locks SQLite, so a heartbeat thread would wait 20 s for the lock."""
    monkeypatch.setattr(runner, "HEARTBEAT_SECONDS", 600.0)
