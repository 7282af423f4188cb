"""The memory forecast of any model from its config.json, by command and API."""

import json

import pytest
from django.core.management import CommandError, call_command

from tests import simulations
from tests.user_errors import raises_user_error
from training.runs.forecast import memory_estimators
from training.runs.forecast.any_model import forecast_any_model
from training.runs.launch.schemas import EXAMPLE_MODEL

pytestmark = pytest.mark.once
SMALL = EXAMPLE_MODEL["config"]


@pytest.fixture(autouse=True)
def simulate_in_process(monkeypatch):
    """Run the estimator process in this process and simulate each request once."""
    monkeypatch.setattr(
        memory_estimators.ANY_MODEL_PROCESS, "request_estimator", simulations.simulate_request
    )


def test_more_rows_take_more_memory():
    small = forecast_any_model(
        SMALL, {"method": "lora", "rank": 4}, rows=2, length=64, device="cpu"
    )
    large = forecast_any_model(
        SMALL, {"method": "lora", "rank": 4}, rows=4, length=64, device="cpu"
    )
    assert small["kinds"]["weights"] > 0 and small["batch"] == [2, 64]
    assert large["step"] > small["step"] >= small["kinds"]["weights"]


def test_a_cpu_without_bf16_is_forecast_in_fp32_on_any_host():
    with_it, without = (
        forecast_any_model(SMALL, {"method": "lora", "rank": 4}, rows=2, length=64, device=d)
        for d in ("cpu", "cpu_fp32")
    )
    assert (with_it["precision"], without["precision"]) == ("bf16", "fp32")
    # The LoRA weights are fp32 in both.
    assert without["kinds"]["weights"] > 1.8 * with_it["kinds"]["weights"]


def test_the_command_prints_a_table(tmp_path, capsys):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(SMALL))
    call_command("forecast", str(path), "--method", "lora", "--length", "64", "--set", "rank=4")
    out = capsys.readouterr().out
    assert "| LoRA | 0.0 M | bf16 | adamw_torch |" in out
    call_command("forecast", str(path), "--method", "ia3", "--length", "64", "--json")
    assert json.loads(capsys.readouterr().out)["ia3"]["step"] > 0
    with pytest.raises(CommandError, match="rank is 0"):
        call_command("forecast", str(path), "--method", "lora", "--set", "rank=0")
    with pytest.raises(CommandError, match="cannot be read"):
        call_command("forecast", str(tmp_path / "no.json"))


@pytest.mark.django_db
def test_the_api_returns_the_same_forecast(client, alice):
    client.force_login(alice)
    body = {
        "config": SMALL,
        "settings": {"method": "lora", "rank": 4},
        "rows": 2,
        "length": 64,
        "device": "cpu",
    }
    response = client.post(
        "/api/v1/runs/forecast/model", body, content_type="application/json"
    ).json()
    assert (
        response["step"]
        == forecast_any_model(SMALL, body["settings"], rows=2, length=64, device="cpu")["step"]
    )


@pytest.mark.parametrize(
    ("config", "values", "facts"),
    [
        ({"model_type": "llama"}, {}, ["architectures"]),
        ({**SMALL, "auto_map": {"AutoModel": "evil.py"}}, {}, ["auto_map"]),
        ({**SMALL, "padding": "x" * 70_000}, {}, ["64,000"]),
        ({**SMALL, "num_hidden_layers": 10**9}, {}, ["num_hidden_layers", 10**9]),
        ({**SMALL, "vocab_size": 10**12}, {}, ["vocab_size", 10**12]),
        ({**SMALL, "hidden_size": "wide"}, {}, []),
        ({**SMALL, "model_type": "none-of-these"}, {}, []),
        (SMALL, {"max_tokens_per_batch": 512}, ["max_tokens_per_batch"]),
    ],
)
def test_a_config_that_cannot_be_forecast_is_rejected(config, values, facts):
    with raises_user_error(naming=facts):
        forecast_any_model(config, values, length=64)
