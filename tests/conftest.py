"""Fixtures of all tests: users (alice owns, bob is on her team, vera views it, lea leads it,
mallory is not on it), a tiny real model, and training data.
"""

import gc
import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests import tiny
from tests.engine.in_process import engine_in_process

REDIS_URL = os.environ.get("REDIS_URL")  # before a test changes it


def pytest_addoption(parser):
    parser.addoption(
        "--only-database",
        action="store_true",
        help="run only the tests that use the database, to test another DATABASE_URL",
    )


def pytest_collection_modifyitems(config, items):
    if config.getoption("--only-database"):
        database_fixtures = {"db", "transactional_db", "django_db_setup"}
        selected = [
            item
            for item in items
            if database_fixtures & set(item.fixturenames) or item.get_closest_marker("django_db")
        ]
        deselected = [
            item for item in items if item not in selected or item.get_closest_marker("once")
        ]
        config.hook.pytest_deselected(items=deselected)
        items[:] = [item for item in items if item not in deselected]


def ignore_imports_in_collections():
    """torch and transformers create a million objects. Without this, every full garbage collection
    walks through them, which takes a third of the time of a simulated step.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def pytest_collection_finish():
    ignore_imports_in_collections()


def pytest_terminal_summary(terminalreporter, config):
    """Prints the seed of pytest-randomly, whose header -q leaves out."""
    seed = getattr(config.option, "randomly_seed", None)
    if seed is not None:
        terminalreporter.write_line(f"Tests ran in the order of --randomly-seed={seed}")


def pytest_make_parametrize_id(val):
    """The id of a bytes parameter is its length: gzip output contains the time, and pytest-xdist
    needs the same ids in every process.
    """
    return f"{len(val)} bytes" if isinstance(val, bytes) else None


@pytest.fixture(autouse=True)
def quick_passwords(settings):
    """A cheap password hasher, instead of a million rounds of PBKDF2."""
    settings.PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]


@pytest.fixture(autouse=True)
def forget_sign_in_attempts():
    """Redis keeps them for five minutes, so that the next test of the same user would be blocked;
    the database forgets them with the test's transaction.
    """
    yield
    if REDIS_URL:
        from training.people.sign_in_attempts import REDIS_PREFIX, get_redis_client

        client = get_redis_client(REDIS_URL)
        if keys := client.keys(f"{REDIS_PREFIX}*"):
            client.delete(*keys)


@pytest.fixture(scope="session", autouse=True)
def cache_static_files():
    """WhiteNoise searches all static files for every new client, which takes 50 ms each time."""
    from whitenoise.middleware import WhiteNoiseMiddleware

    find_files, files = WhiteNoiseMiddleware.add_files_from_finders, {}

    def add_files(self):
        if not files:
            find_files(self)
            files.update(self.files)
        self.files.update(files)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WhiteNoiseMiddleware, "add_files_from_finders", add_files)
        yield


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A Llama model with 2 layers and its own tokenizer, saved as safetensors."""
    folder = tiny.make_model(tmp_path_factory.mktemp("tiny") / "tiny-llama")
    ignore_imports_in_collections()
    return folder


@pytest.fixture
def tiny_run(tmp_path, tiny_model):
    """Creates run folders for the engine; settings are keyword arguments."""

    def make(name="run", rows=tiny.ROWS, **settings):
        return tiny.make_run(tmp_path / name, tiny_model, rows, **settings)

    return make


@pytest.fixture
def engine_here():
    """Runs the engine in this process: `engine_here([folder])` returns its exit code."""
    with engine_in_process() as main:
        yield main


@pytest.fixture(scope="session")
def engine_results(tmp_path_factory):
    return tmp_path_factory.mktemp("left")


@pytest.fixture
def engine_once(engine_here, engine_results):
    """Like `engine_here`, but runs with equal settings are trained only once; later ones get a copy
    of the result.
    """

    def main(arguments):
        folder = Path(arguments[0])
        config = json.loads((folder / "config.json").read_text())
        data = ("train_data", "eval_data")  # their folders have other names each time
        digests = config | {
            name: hashlib.sha256(Path(config[name]).read_bytes()).hexdigest()
            for name in data
            if config.get(name)
        }
        cached = (
            engine_results
            / hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()
        )
        if cached.is_dir():
            shutil.copytree(
                cached, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("config.json")
            )
            return 0
        code = engine_here([str(folder)])
        if code == 0:
            shutil.copytree(folder, cached)
        return code

    return main


@pytest.fixture
def people(db):
    from training.people.models import Team, User
    from training.people.teams import add_member

    names = ("alice", "bob", "vera", "lea", "mallory")
    users = {name: User.objects.create_user(name, password="a-long-word-1") for name in names}
    users["admin"] = User.objects.create_superuser("root", password="a-long-word-1")
    voice = Team.objects.create(name="voice")
    for name, role in (("alice", "member"), ("bob", "member"), ("vera", "viewer"), ("lea", "lead")):
        add_member(users[name], voice, role)
    add_member(users["mallory"], Team.objects.create(name="others"), "lead")
    return users


@pytest.fixture
def alice(people):
    return people["alice"]


@pytest.fixture
def base_model(db, tiny_model):
    from training.catalog.metadata import read_model_metadata
    from training.catalog.models import BaseModel

    return BaseModel.objects.create(
        name="tiny-llama",
        source="folder",
        location=str(tiny_model),
        state="ready",
        metadata=read_model_metadata(tiny_model),
    )


@pytest.fixture
def data(alice):
    from training.datasets.upload_job import create_dataset

    return create_dataset(
        alice, "Lights", tiny.encode_jsonl(tiny.ROWS), source="upload: lights.jsonl"
    )


@pytest.fixture
def preview_here(monkeypatch):
    """Rows are tokenized in this process, quicker by 2 s of imports for every question."""

    def run_child(module, *, stdin, **_limits):
        from training.engine.data import preview

        assert module == preview.__name__
        output = json.dumps(preview.handle_request(json.loads(stdin)))
        return subprocess.CompletedProcess([module], 0, output, "")

    monkeypatch.setattr("training.runs.forecast.token_lengths.run_child", run_child)


@pytest.fixture
def no_queue(monkeypatch):
    """No worker is rung; the list of runs that would have been."""
    enqueued = []
    monkeypatch.setattr("training.runs.worker.tasks.supervise_task", enqueued.append)
    return enqueued


@pytest.fixture
def device(db):
    """This host as a worker reports it: one CPU with 24 GB."""
    from training.gpus import devices
    from training.gpus.models import Device

    devices.update_devices(
        [
            devices.DeviceReading(
                0, "cpu-here", "CPU, 2 cores", devices.CPU, 24 * 10**9, 4 * 10**9, 0.1
            )
        ]
    )
    return Device.objects.get()


@pytest.fixture
def run(alice, base_model, data, device, no_queue, django_capture_on_commit_callbacks):
    """A queued run of alice's."""
    from tests.launching import launch_run

    with django_capture_on_commit_callbacks(execute=True):
        launched = launch_run(
            alice, base_model=base_model, data=data, settings=tiny.SETTINGS, name="Lights, tiny"
        )
    yield launched
    shutil.rmtree(launched.folder, ignore_errors=True)


@pytest.fixture
def as_alice(client, alice):
    client.force_login(alice)
    return client


@pytest.fixture
def as_mallory(client, people):
    client.force_login(people["mallory"])
    return client
