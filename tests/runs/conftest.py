"""Fixtures for tests of runs."""

import shutil

import pytest

from tests import simulations, tiny
from training.engine.config import RunConfig
from training.gpus import devices
from training.runs.forecast import memory_estimators, token_lengths

GB = 10**9


@pytest.fixture
def counted(data, base_model, device, monkeypatch):
    """The dataset, with counted tokens and the memory estimator of LoRA for every method. Besides
    this host's CPU there is a device with 3 GB free.
    """
    row_lengths = tiny.make_token_lengths(data.train_rows)
    lora = RunConfig.from_dict({"method": "lora"}).to_dict()
    estimator_request = {"model": str(base_model.folder), "settings": lora, "device": "cpu"}
    monkeypatch.setattr(
        memory_estimators.ESTIMATOR_PROCESS,
        "request_estimator",
        lambda _request: simulations.simulate_request(estimator_request),
    )
    for name in ("get_lengths", "get_cached_lengths"):
        monkeypatch.setattr(token_lengths, name, lambda *_args, **_more: row_lengths)
    monkeypatch.setattr(
        "training.runs.launch.request.get_cached_lengths", lambda *_a, **_m: row_lengths
    )
    small = devices.DeviceReading(0, "small", "Small", "Small", 16 * GB, 13 * GB)
    devices.update_devices([small], host="attic")
    return data


@pytest.fixture
def launched(transactional_db, alice, base_model, data, device, no_queue):
    from tests.launching import launch_run

    runs = []

    def launch(**settings):
        run = launch_run(
            alice,
            base_model=base_model,
            data=data,
            settings={**tiny.SETTINGS, **settings},
            name="Lamps",
        )
        runs.append(run)
        return run

    yield launch
    for run in runs:
        shutil.rmtree(run.folder, ignore_errors=True)
