"""What the tests of launching share."""

import pytest

from tests import tiny
from training.engine.config import RunConfig
from training.gpus import devices
from training.runs.forecast import memory_estimators, token_lengths

GB = 10**9


@pytest.fixture
def counted(data, base_model, device, monkeypatch, tiny_laws):
    """The data's tokens are counted and a memory law is at hand, LoRA's for every technique; beside
    this host's CPU there is a device with 3 GB free.
    """
    lengths = tiny.measured(data.train_rows)
    lora = RunConfig.from_dict({"method": "lora"}).to_dict()
    wanted = {"model": str(base_model.folder), "settings": lora, "device": "cpu"}
    monkeypatch.setattr(memory_estimators.PROGRAM, "ask", lambda _request: tiny_laws(wanted))
    for name in ("lengths", "kept_lengths"):
        monkeypatch.setattr(token_lengths, name, lambda *_args, **_more: lengths)
    monkeypatch.setattr("training.runs.launch.request.kept_lengths", lambda *_a, **_m: lengths)
    small = devices.Reading(0, "small", "Small", "Small", 16 * GB, 13 * GB)
    devices.report([small], host="attic")
    return data
