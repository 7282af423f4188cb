import pytest
from django.conf import settings

from training.people.sign_in_attempts import REDIS_PREFIX, get_redis_client


@pytest.fixture(autouse=True)
def delete_earlier_attempts():
    """The database is rolled back after each test, but all tests share one Redis."""
    if settings.REDIS_URL:
        client = get_redis_client(settings.REDIS_URL)
        for key in client.scan_iter(f"{REDIS_PREFIX}*"):
            client.delete(key)
