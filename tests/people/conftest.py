import pytest
from django.conf import settings

from training.people.sign_in_attempts import REDIS_PREFIX, get_redis_client


@pytest.fixture(autouse=True)
def no_attempts_of_earlier_tests():
    """The database forgets them with each test; a Redis that the whole suite shares does not."""
    if settings.REDIS_URL:
        client = get_redis_client(settings.REDIS_URL)
        for key in client.scan_iter(f"{REDIS_PREFIX}*"):
            client.delete(key)
