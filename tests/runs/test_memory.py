"""The memory forecast: an estimator gives the same peak for every batch as a simulation of that
batch, and estimators are cached.
"""

import json
from dataclasses import replace

import pytest

from tests.user_errors import raises_user_error
from training.engine.config import RunConfig
from training.engine.memory_estimator import BatchShape, MemoryEstimator, find_peak_memory
from training.engine.methods import METHODS
from training.runs.forecast import memory, memory_estimators
from training.runs.forecast.target_device import get_target_device
from training.runs.models import Run


@pytest.fixture(scope="module")
def simulated(tiny_model):
    """Estimators of three methods, and a simulation at full depth of a batch that was not
    sampled.
    """
    from training.engine.simulation.fake_step import SimulatedStep, load_model_config
    from training.engine.simulation.forecast import build_estimator

    results = {}
    for method in ("lora", "full", "prefix"):
        config = replace(RunConfig.from_dict({"method": method}), precision="fp32")
        estimator = build_estimator(tiny_model, config, "cpu")
        run = SimulatedStep(
            load_model_config(tiny_model), config, layers=2, precision="fp32", device="cpu"
        )
        batch = BatchShape(5, 70, 90)
        run.run_step(batch)
        snapshots = run.run_step(batch)
        step_bytes = max(
            sum(row)
            for name, rows in snapshots.items()
            for row in rows
            if not name.startswith("eval")
        )
        eval_bytes = max(
            sum(row) for name, rows in snapshots.items() for row in rows if name.startswith("eval")
        )
        results[method] = (config, estimator, batch, step_bytes, eval_bytes, run.num_trainable)
        run.close()
    return results


@pytest.mark.parametrize("method", ["lora", "full", "prefix"])
def test_an_estimator_agrees_with_a_simulation_of_the_batch(simulated, method):
    config, estimator, batch, step_bytes, eval_bytes, trainable = simulated[method]
    restored = MemoryEstimator.from_json(json.loads(json.dumps(estimator.to_json())))
    assert find_peak_memory(restored, [batch], config).total == pytest.approx(step_bytes, rel=0.005)
    assert find_peak_memory(restored, [batch], config, is_eval=True).total == pytest.approx(
        eval_bytes, rel=0.005
    )
    assert memory.estimate_trainable_parameters(restored, config) == trainable


def test_a_higher_rank_and_a_larger_batch_need_more_memory(simulated):
    config, estimator, batch, step_bytes, _, _ = simulated["lora"]
    assert find_peak_memory(estimator, [batch], replace(config, rank=64)).total > step_bytes
    assert find_peak_memory(estimator, [BatchShape(10, 70, 90)], config).total > step_bytes
    assert set(find_peak_memory(estimator, [batch], config).kinds) >= {
        "weights",
        "gradients",
        "optimizer",
        "activations",
        "logits",
        "temporary",
    }


def test_an_estimator_is_fitted_once_and_cached(
    tiny_model, settings, tmp_path, monkeypatch, simulated
):
    settings.HOME = tmp_path
    requests = []
    response = simulated["lora"][1].to_json()
    monkeypatch.setattr(
        memory_estimators.ESTIMATOR_PROCESS,
        "request_estimator",
        lambda request: requests.append(request) or response,
    )
    config = RunConfig()
    assert memory_estimators.get_cached_estimator(tiny_model, config, "cpu") is None
    for one in (
        config,
        replace(config, rank=32),
        replace(config, learning_rate=0.002),
        replace(config, max_length=256),
    ):
        memory_estimators.get_estimator(tiny_model, one, "cpu")
    assert len(requests) == 1
    memory_estimators.get_estimator(tiny_model, replace(config, gradient_checkpointing=True), "cpu")
    assert len(requests) == 2


def test_a_method_that_cannot_be_simulated_raises_each_time(
    tiny_model, settings, tmp_path, monkeypatch
):
    settings.HOME = tmp_path
    monkeypatch.setattr(
        memory_estimators.ESTIMATOR_PROCESS,
        "request_estimator",
        lambda _request: {"error": "It does not fit.", "field": "method"},
    )
    for _ in range(2):
        with raises_user_error(memory_estimators.CannotEstimate, field="method"):
            memory_estimators.get_estimator(tiny_model, RunConfig(), "cpu")


def test_the_estimator_process_responds(tiny_model, settings, tmp_path):
    settings.HOME = tmp_path
    with raises_user_error(memory_estimators.CannotEstimate, naming=["no_such_layer"]):
        memory_estimators.get_estimator(
            tiny_model, RunConfig(target_modules="no_such_layer"), "cpu"
        )


def test_a_transient_failure_is_not_cached(tiny_model, settings, tmp_path, monkeypatch, simulated):
    settings.HOME = tmp_path
    answers = [
        {"error": "It failed.", "field": "model", "is_transient": True},
        simulated["lora"][1].to_json(),
    ]
    monkeypatch.setattr(
        memory_estimators.ESTIMATOR_PROCESS, "request_estimator", lambda _request: answers.pop(0)
    )
    with raises_user_error(field="model"):
        memory_estimators.get_estimator(tiny_model, RunConfig(), "cpu")
    assert memory_estimators.get_cached_estimator(tiny_model, RunConfig(), "cpu") is None
    assert memory_estimators.get_estimator(tiny_model, RunConfig(), "cpu")


def test_an_unreadable_file_is_a_transient_failure(tmp_path):
    from training.engine.simulation import forecast

    response = forecast.handle_request(
        json.dumps({"model": str(tmp_path / "gone"), "settings": {}, "device": "cpu"})
    )
    assert response["is_transient"]


def test_the_cache_key_depends_on_dropout_but_not_on_its_rate(tiny_model):
    keys = [
        memory_estimators.compute_cache_key(tiny_model, RunConfig(dropout=share), "cpu")
        for share in (0.0, 0.05, 0.1)
    ]
    assert keys[0] != keys[1] == keys[2]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A Llama of 6 layers, large enough that memory outside its tensors is negligible."""
    from benchmarks import forecast

    return forecast.make_models(tmp_path_factory.mktemp("models"))["llama"]


LOW_MEMORY = {"optim": "adamw_8bit", "gradient_checkpointing": True}


@pytest.mark.parametrize(
    ("method", "more"),
    [
        *((name, {}) for name in METHODS),
        ("full", LOW_MEMORY),
        ("full", {**LOW_MEMORY, "precision": "bf16"}),
    ],
)
def test_a_real_step_uses_the_forecast_memory(llama, method, more):
    """Measured with the allocator's log. `benchmarks/forecast.py` covers the whole grid."""
    import torch

    from benchmarks import forecast
    from training.engine.modeling import model as loaded

    torch.manual_seed(0)
    settings = {"method": method, "precision": "fp32", **more} | (
        {"prompt_tuning_init": "random"} if method == "prompt" else {}
    )
    config, shape = RunConfig.from_dict(settings), BatchShape(3, 160, 200)
    assert loaded.resolve_device().type == "cpu"
    forecast_bytes = forecast.forecast_bytes(llama, config, shape, torch.device("cpu"))
    assert forecast_bytes == pytest.approx(
        forecast.measure_peak(llama, config, shape, torch.device("cpu")), rel=0.05
    )


def test_past_runs_correct_the_fixed_overhead_but_never_below_zero(run):
    target = get_target_device()
    assert memory.get_fixed_overhead(target).framework == memory.FRAMEWORK_BYTES[target.kind]
    past_forecast = {"device": target.name, "variable": 10**9, "optimizer": "adamw_torch"}
    Run.objects.filter(pk=run.pk).update(
        state="finished", peak_memory_bytes=13 * 10**8, forecast=past_forecast
    )
    assert memory.get_fixed_overhead(target).framework == 3 * 10**8
    Run.objects.filter(pk=run.pk).update(peak_memory_bytes=5 * 10**8)
    assert memory.get_fixed_overhead(target).framework == 0
    Run.objects.filter(pk=run.pk).update(forecast=past_forecast | {"optimizer": "paged_adamw_8bit"})
    assert memory.get_fixed_overhead(target).framework == memory.FRAMEWORK_BYTES[target.kind]


def test_a_simulation_ignores_rank_patterns(tiny_model):
    """The shallow model has no layer 10. The engine checks the names of a pattern at its start."""
    from training.engine.memory_estimator import SAMPLE_DEPTHS
    from training.engine.simulation.fake_step import SimulatedStep, load_model_config

    config = RunConfig(
        precision="fp32", target_modules="q_proj", rank_pattern="layers.10.mlp.down_proj=32"
    )
    for layers in SAMPLE_DEPTHS:
        run = SimulatedStep(
            load_model_config(tiny_model), config, layers=layers, precision="fp32", device="cpu"
        )
        assert run.num_trainable > 0
        run.close()
