"""Sign-in attempts are counted for all web processes together, in the database or in Redis."""

import os
import shutil
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import redis
from django.db import connection
from django.utils import timezone

from training.people.models import SignInAttempts
from training.people.sign_in_attempts import (
    REDIS_PREFIX,
    WINDOW_SECONDS,
    clear_attempts,
    count_attempt,
    get_redis_client,
    subtract_attempt,
)

ROOT = Path(__file__).parents[2]
# Another web process: it waits for a line of input, counts 25 attempts and prints the counts.
COUNT_PROGRAM = """
import sys, django
django.setup()
from django.db import connection
from training.people.sign_in_attempts import count_attempt
connection.settings_dict["NAME"] = sys.argv[1]
print("ready", flush=True)
sys.stdin.readline()
print(*(count_attempt("same") for _ in range(25)))
"""


@pytest.fixture(params=["database", "redis"])
def store(request, settings):
    """Where attempts are counted: each test runs with both."""
    if request.param == "redis":
        settings.REDIS_URL = request.getfixturevalue("redis_server")
        return request.param
    settings.REDIS_URL = ""
    return request.param


@pytest.fixture
def redis_server(tmp_path):
    program = shutil.which("redis-server")
    if program is None:
        pytest.skip("redis-server is not installed")
    url = f"unix://{tmp_path}/redis.sock"
    options = ["--port", "0", "--unixsocket", f"{tmp_path}/redis.sock", "--save", ""]
    server = subprocess.Popen([program, *options], stdout=subprocess.DEVNULL, cwd=tmp_path)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            redis.Redis.from_url(url).ping()
            break
        except redis.RedisError:
            time.sleep(0.02)
    yield url
    get_redis_client.cache_clear()
    server.kill()
    server.wait()


@pytest.mark.django_db(transaction=True)
def test_two_processes_count_together_without_losing_attempts(store, settings):
    environment = {
        **os.environ,
        "DJANGO_SETTINGS_MODULE": "snapml_site.settings",
        "REDIS_URL": settings.REDIS_URL,
    }
    command = [sys.executable, "-c", COUNT_PROGRAM, str(connection.settings_dict["NAME"])]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, cwd=ROOT, env=environment, **pipes) for _ in range(2)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    counts = [
        int(count) for process in processes for count in process.communicate(timeout=60)[0].split()
    ]
    assert sorted(counts) == list(range(1, 51))
    assert count_attempt("same") == 51


@pytest.mark.django_db
def test_keys_are_counted_separately_and_can_be_cleared(store):
    assert [count_attempt(key) for key in ("a", "a", "b")] == [1, 2, 1]
    clear_attempts(["a"])
    assert [count_attempt(key) for key in ("a", "b")] == [1, 2]


@pytest.mark.django_db
def test_an_attempt_is_subtracted_only_from_a_counter_that_exists(store):
    subtract_attempt("a")
    assert [count_attempt("a"), count_attempt("a")] == [1, 2]
    subtract_attempt("a")
    assert count_attempt("a") == 2


@pytest.mark.django_db
def test_the_window_ends_even_while_attempts_continue(store, settings):
    count_attempt("a")
    if store == "redis":
        client = get_redis_client(settings.REDIS_URL)
        client.expire(REDIS_PREFIX + "a", 100)
        count_attempt("a")
        assert 0 < client.ttl(REDIS_PREFIX + "a") <= 100
        client.pexpire(REDIS_PREFIX + "a", 1)
        time.sleep(0.01)
    else:
        ends_at = SignInAttempts.objects.get().ends_at
        count_attempt("a")
        assert SignInAttempts.objects.get().ends_at == ends_at
        SignInAttempts.objects.update(ends_at=timezone.now() - timedelta(seconds=1))
    assert count_attempt("a") == 1


@pytest.mark.django_db
def test_expired_rows_are_deleted(settings):
    settings.REDIS_URL = ""
    for key in ("a", "b"):
        count_attempt(key)
    SignInAttempts.objects.update(ends_at=timezone.now())
    count_attempt("c")
    assert list(SignInAttempts.objects.values_list("key", flat=True)) == ["c"]


@pytest.mark.django_db
def test_redis_keys_are_hashed_and_expire(client, people, settings, redis_server):
    settings.REDIS_URL = redis_server
    address = {"REMOTE_ADDR": "198.51.100.7"}
    client.post("/sign-in", {"username": "alice", "password": "nope"}, **address)
    redis_store = get_redis_client(redis_server)
    keys = redis_store.keys()
    assert len(keys) == 2
    for key in keys:
        assert key.startswith(REDIS_PREFIX.encode()) and b"alice" not in key
        assert redis_store.get(key) == b"1"
        assert 0 < redis_store.ttl(key) <= WINDOW_SECONDS
    client.post("/sign-in", {"username": "alice", "password": "a-long-word-1"}, **address)
    (key,) = redis_store.keys()
    assert redis_store.get(key) == b"1"  # the failed attempt of this address


@pytest.mark.django_db
def test_without_redis_sign_in_is_a_503_that_names_redis(client, people, settings, tmp_path):
    settings.REDIS_URL = f"unix://{tmp_path}/nobody.sock"
    response = client.post("/sign-in", {"username": "alice", "password": "a-long-word-1"})
    assert response.status_code == 503
    assert "Redis" in response.content.decode()
    assert client.get("/")["Location"].startswith("/sign-in")
    get_redis_client.cache_clear()


@pytest.mark.django_db
def test_too_many_failed_sign_ins_are_blocked_with_either_store(client, people, store):
    for _ in range(10):
        client.post("/sign-in", {"username": "alice", "password": "nope"})
    get_redis_client.cache_clear()
    response = client.post("/sign-in", {"username": "alice", "password": "a-long-word-1"})
    assert response.status_code == 429
