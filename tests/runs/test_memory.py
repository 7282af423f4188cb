"""The memory forecast: one law answers every batch as a simulation of that very batch does, and the card says whether it fits."""

import json
from dataclasses import replace

import pytest

from training.engine.config import RunConfig
from training.engine.memory_law import Law, Shape, largest
from training.errors import UserError
from training.runs import laws, memory


@pytest.fixture(scope="module")
def simulated(tiny_model):
    """Laws of three techniques, and what the fake run at full depth says of a batch that no law has seen."""
    from training.engine.fake_step import FakeRun, model_config_of
    from training.engine.forecast import law_of

    found = {}
    for method in ("lora", "full", "prefix"):
        config = replace(RunConfig.from_dict({"method": method}), precision="fp32")
        law = law_of(tiny_model, config, "cpu")
        run = FakeRun(model_config_of(tiny_model), config, layers=2, precision="fp32", device="cpu")
        batch = Shape(5, 70, 90)
        run.step(batch)
        moments = run.step(batch)
        told = max(sum(row) for name, rows in moments.items() for row in rows if not name.startswith("eval"))
        measuring = max(sum(row) for name, rows in moments.items() for row in rows if name.startswith("eval"))
        found[method] = (config, law, batch, told, measuring, run.trainable)
        run.close()
    return found


@pytest.mark.parametrize("method", ["lora", "full", "prefix"])
def test_a_law_tells_a_batch_as_its_own_simulation_does(simulated, method):
    config, law, batch, told, measuring, trainable = simulated[method]
    kept = Law.from_json(json.loads(json.dumps(law.to_json())))
    assert largest(kept, [batch], config).total == pytest.approx(told, rel=0.005)
    assert largest(kept, [batch], config, measuring=True).total == pytest.approx(measuring, rel=0.005)
    assert memory.law_trainable(kept, config) == trainable


def test_a_higher_rank_and_a_larger_batch_take_more(simulated):
    config, law, batch, told, _, _ = simulated["lora"]
    assert largest(law, [batch], replace(config, rank=64)).total > told
    assert largest(law, [Shape(10, 70, 90)], config).total > told
    assert set(largest(law, [batch], config).kinds) >= {"weights", "gradients", "optimizer", "activations", "logits", "temporary"}


def test_a_law_is_asked_once_and_kept(tiny_model, settings, tmp_path, monkeypatch, simulated):
    settings.HOME = tmp_path
    asked = []
    told = simulated["lora"][1].to_json()
    monkeypatch.setattr(laws.PROGRAM, "ask", lambda request: asked.append(request) or told)
    config = RunConfig()
    assert laws.kept_law(tiny_model, config, "cpu") is None
    for one in (config, replace(config, rank=32), replace(config, learning_rate=0.002), replace(config, max_length=256)):
        laws.law(tiny_model, one, "cpu")
    assert len(asked) == 1
    laws.law(tiny_model, replace(config, gradient_checkpointing=True), "cpu")
    assert len(asked) == 2


def test_a_technique_that_does_not_fit_says_so_each_time(tiny_model, settings, tmp_path, monkeypatch):
    settings.HOME = tmp_path
    monkeypatch.setattr(laws.PROGRAM, "ask", lambda _request: {"error": "It does not fit.", "field": "method"})
    for _ in range(2):
        with pytest.raises(UserError, match="does not fit"):
            laws.law(tiny_model, RunConfig(), "cpu")
