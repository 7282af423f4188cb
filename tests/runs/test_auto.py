"""Auto LLM on the launch page, in the API and from a file: plans with reasons, locks, launches, and
the plan that is stored with the run.
"""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from django.core.management import call_command
from django.urls import reverse

from tests import simulations, tiny
from tests.launching import launch_run
from tests.pages import normalize_markup
from training.gpus.models import Device, Quota
from training.runs.forecast import memory_estimators, token_lengths
from training.runs.forecast.target_device import get_target_device
from training.runs.launch import auto
from training.runs.models import Run

pytestmark = [pytest.mark.django_db, pytest.mark.once]
SIMULATING = "simulating…"


@pytest.fixture
def ready(data, base_model, device, settings, monkeypatch):
    """Data and model with measured token lengths, and a device with 8 GB free memory."""
    row_lengths = tiny.make_token_lengths(data.train_rows)
    monkeypatch.setattr(
        memory_estimators.ESTIMATOR_PROCESS, "request_estimator", simulations.simulate_request
    )
    shutil.rmtree(Path(settings.HOME) / "memory_estimators", ignore_errors=True)
    monkeypatch.setattr(token_lengths, "get_cached_lengths", lambda *_args, **_more: row_lengths)
    monkeypatch.setattr(token_lengths, "get_lengths", lambda *_args, **_more: row_lengths)
    set_free_memory(8 * 10**9)
    form = {
        "mode": "auto",
        "mode-was": "auto",
        "model": base_model.pk,
        "data": data.pk,
        "goal": "task",
    }
    return SimpleNamespace(model=base_model, data=data, form=form)


def set_free_memory(free):
    Device.objects.update(total_bytes=16 * 10**9, used_bytes=16 * 10**9 - free)


def render_planned_card(client, form):
    client.post(reverse("run-memory"), form)
    return normalize_markup(client.post(reverse("run-summary"), form))


def get_plan_digest(page):
    return page.split('name="plan_digest" value="')[1].split('"')[0]


def test_a_plan_is_shown_with_reasons_and_stored_with_the_run(client, alice, ready):
    client.force_login(alice)
    before = normalize_markup(client.post(reverse("run-summary"), ready.form))
    assert reverse("run-memory") in before and "Planning…" in before
    page = render_planned_card(client, ready.form)
    assert "LoRA fits" in page and "QLoRA would need" in page
    answer = client.post(reverse("run-new"), ready.form | {"plan_digest": get_plan_digest(page)})
    run = Run.objects.get()
    assert answer.url == reverse("run", args=[run.pk])
    assert run.method == "lora"
    choices = {one["setting"]: one for one in run.auto_plan["choices"]}
    assert choices["rank"]["value"] == run.config["rank"]
    assert "LoRA fits" in normalize_markup(client.get(answer.url))


def test_a_changed_value_is_locked_and_unchecking_unlocks_it(client, alice, ready):
    client.force_login(alice)
    page = render_planned_card(client, ready.form | {"set-rank": "4", "was-rank": "8"})
    assert 'id="set-rank" name="set-rank" value="4"' in page
    assert 'value="8" autocomplete' in page.split('name="set-alpha"')[1][:60], (
        "alpha is planned around it"
    )
    unchanged = {"set-rank": "4", "was-rank": "4"}
    assert 'name="set-rank" value="4"' in render_planned_card(
        client, ready.form | unchanged | {"lock": "rank"}
    )
    assert 'name="set-rank" value="4"' not in render_planned_card(client, ready.form | unchanged)


def test_an_invalid_lock_is_an_error_and_keeps_the_plan_on_the_page(client, alice, ready):
    client.force_login(alice)
    page = render_planned_card(client, ready.form | {"set-rank": "0", "was-rank": "8"})
    assert "rank is 0" in page and "1024" in page
    assert "Fix Rank" in page and 'id="plan"' not in page


def test_a_changed_plan_is_shown_again_and_not_started(client, alice, ready):
    client.force_login(alice)
    page = render_planned_card(client, ready.form)
    set_free_memory(4 * 10**8)
    answer = client.post(reverse("run-new"), ready.form | {"plan_digest": get_plan_digest(page)})
    assert answer.status_code in (400, 409)
    assert not Run.objects.exists()


def test_a_model_that_never_fits_cannot_be_started(client, alice, ready):
    client.force_login(alice)
    set_free_memory(10**6)
    locks = {
        "set-method": "lora",
        "set-gradient_checkpointing": "off",
        "lock": ["method", "gradient_checkpointing"],
    }
    page = render_planned_card(client, ready.form | locks)
    assert "Not enough memory" in page and "disabled" in page.split("<button")[-1]


def test_manual_settings_after_auto_start_from_the_plan(client, alice, ready):
    client.force_login(alice)
    render_planned_card(client, ready.form)
    page = normalize_markup(client.post(reverse("run-settings"), ready.form | {"mode": "manual"}))
    assert 'name="max_length" inputmode="decimal" autocomplete="off" value="64"' in page
    back = normalize_markup(
        client.post(reverse("run-settings"), ready.form | {"mode-was": "manual"})
    )
    assert 'class="plan"' in back


def test_the_api_plans_and_starts(client, alice, ready):
    client.force_login(alice)
    headers = {"content_type": "application/json"}
    body = {"model": ready.model.pk, "data": ready.data.pk}
    plan = client.post(
        "/api/v1/runs/plan", body | {"goal": "style", "locked": {"epochs": 2}}, **headers
    ).json()
    assert plan["settings"]["epochs"] == 2 and {"setting", "why", "alternative", "locked"} <= set(
        plan["choices"][0]
    )
    response = client.post("/api/v1/runs", body | {"auto": {"locked": {"rank": 4}}}, **headers)
    assert response.status_code == 201, response.content
    assert response.json()["config"]["rank"] == 4 and response.json()["auto_plan"]["choices"]
    wrong = client.post("/api/v1/runs", body | {"auto": {}, "settings": {"rank": 4}}, **headers)
    assert wrong.status_code == 400 and "auto.locked" in wrong.content.decode()
    unknown = client.post("/api/v1/runs/plan", body | {"goal": "fame"}, **headers)
    assert unknown.status_code == 400 and unknown.json()["error"]["field"] == "goal"


def test_a_file_can_use_auto(alice, ready, tmp_path, capsys):
    file = tmp_path / "auto.yaml"
    file.write_text(
        f"model: {ready.model.name}\ndata: {ready.data.dataset.name}\nauto: {{goal: hard, locked: "
        f"{{learning_rate: 1e-3}}}}\n"
    )
    call_command("launch", str(file), "--user", "alice")
    assert Run.objects.get().config["learning_rate"] == 1e-3
    assert "rank = " in capsys.readouterr().out


def test_the_model_card_contains_the_plan(alice, ready):
    from adapters.registry.model_card import EvalResult, build_card

    run = launch_run(
        alice, base_model=ready.model, data=ready.data, auto=auto.AutoRequest(), name="Lamps <b>"
    )
    text = build_card(run, EvalResult(step=5, eval_loss=1.25))
    assert (
        "**method = lora**: LoRA fits" in text
        and "Held-out loss: 1.2500 nats" in text
        and "\\<b\\>" in text
    )


def test_method_cards_show_their_memory_and_gray_out_what_does_not_fit(client, alice, ready):
    client.force_login(alice)
    form = ready.form | {"mode": "manual", "mode-was": "manual", "method": "lora"}
    page = normalize_markup(client.post(reverse("run-costs"), form))
    assert SIMULATING in page
    assert 'hx-target="#settings-form" hx-swap="innerHTML"' in page, (
        "otherwise htmx inherits the outerHTML swap of the method list"
    )
    for _ in range(12):
        if SIMULATING not in page:
            break
        page = normalize_markup(client.post(reverse("run-costs"), form))
    assert page.count(": fits") == 7
    assert "Cannot be merged" in page
    set_free_memory(1)
    page = normalize_markup(client.post(reverse("run-costs") + "?cached_only=1", form))
    assert page.count("does not fit now") == 7 and "gray" in page


def test_the_worker_adds_a_missing_forecast_to_a_launched_run(run, ready):
    from training.runs.launch import method_costs

    Run.objects.update(forecast={})
    method_costs.attempted_paths.clear()
    method_costs.compute_missing_forecasts()
    run.refresh_from_db()
    assert run.forecast["peak"] > 0


def test_the_worker_precomputes_estimators_of_default_settings(ready, settings):
    from training.engine.config import RunConfig
    from training.runs.launch import method_costs

    method_costs.attempted_paths.clear()
    for _ in range(8):
        method_costs.precompute_estimator()
    assert memory_estimators.get_cached_estimator(
        ready.model.folder, RunConfig.from_dict({"method": "ia3"}), "cpu"
    )


def test_locks_survive_a_pending_simulation(client, alice, ready):
    client.force_login(alice)
    locked = ready.form | {"set-target_modules": "q_proj", "was-target_modules": "all-linear"}
    waiting = normalize_markup(client.post(reverse("run-summary"), locked))
    assert '<input type="hidden" name="set-target_modules" value="q_proj">' in waiting
    assert '<input type="hidden" name="lock" value="target_modules">' in waiting


def test_a_failed_simulation_shows_an_error_and_is_not_requested_again(
    client, alice, ready, monkeypatch
):
    from training.errors import UserError

    def fail(_request):
        raise UserError("The simulation failed.")

    client.force_login(alice)
    monkeypatch.setattr(memory_estimators.ESTIMATOR_PROCESS, "request_estimator", fail)
    answer = client.post(
        reverse("run-memory"),
        ready.form | {"set-target_modules": "k_proj", "was-target_modules": "all-linear"},
    )
    assert "The simulation failed." in answer.content.decode() and "HX-Trigger" not in answer


def test_a_method_without_gradient_checkpointing_has_no_row_for_it(client, alice, ready):
    client.force_login(alice)
    page = render_planned_card(client, ready.form | {"set-method": "prefix", "was-method": "lora"})
    assert "set-gradient_checkpointing" not in page and "set-learning_rate" in page


def test_a_file_with_invalid_values_shows_the_page_with_an_error(client, alice, ready):
    import io

    client.force_login(alice)
    for text in ("learning_rate: []", "learning_rate: {a: 1}"):
        file = io.BytesIO(f"model: tiny-llama\ndata: Lights\nsettings:\n  {text}\n".encode())
        file.name = "run.yaml"
        answer = client.post(reverse("run-file"), {"file": file})
        assert answer.status_code == 400 and "learning_rate" in answer.content.decode()


def test_a_plan_respects_the_memory_limit_of_the_teams_quota(ready, device):
    Quota.objects.create(pool=device.pool, team=ready.data.dataset.team, max_bytes=3 * 10**9)
    inputs = auto.build_plan_inputs(
        auto.PlanContext(
            ready.model, ready.data, token_lengths.get_cached_lengths(), get_target_device()
        ),
        memory_estimators.get_estimator,
    )
    assert (inputs.total_bytes, inputs.free_bytes) == (3 * 10**9, 3 * 10**9)
