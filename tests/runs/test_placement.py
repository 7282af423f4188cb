"""Pool and priority are chosen at launch, and the forecast is for a device of that pool."""

import html

import pytest
from django.urls import reverse

from tests import tiny
from tests.launching import launch_run
from tests.pages import normalize_markup
from tests.user_errors import assert_mentions
from training.errors import NotAllowed
from training.gpus import devices
from training.gpus.models import Device, Pool
from training.runs.forecast.target_device import get_target_device
from training.runs.models import Run, Sweep
from training.runs.queue.placement import Placement

GB = 10**9
pytestmark = pytest.mark.django_db


@pytest.fixture
def cards(device):
    """Two GPU pools on another host, in addition to this host's CPU."""
    readings = [
        devices.DeviceReading(0, "a", "H100", "H100", 80 * GB, 30 * GB),
        devices.DeviceReading(1, "b", "H100", "H100", 80 * GB, GB),
        devices.DeviceReading(2, "c", "T4", "T4", 16 * GB, GB),
    ]
    devices.update_devices(readings, host="cards")
    return {pool.kind: pool for pool in Pool.objects.all()}


@pytest.fixture
def form(base_model, data):
    return {
        "mode": "manual",
        "mode-was": "manual",
        "method": "lora",
        "model": base_model.pk,
        "data": data.pk,
    }


def render_summary(client, form):
    return client.post(reverse("run-summary"), form).content.decode()


def test_a_run_is_launched_in_the_chosen_pool_with_its_priority(as_alice, form, cards, no_queue):
    page = normalize_markup(as_alice.get(reverse("run-new")))
    assert ">T4</option>" in page and ">Urgent<" not in page
    summary = render_summary(as_alice, form | {"pool": cards["T4"].pk})
    assert "T4, 15.0 of 16.0 GB free" in summary
    accepted = summary.split('name="accepted_warnings" value="')[1:]
    started = form | {
        "pool": cards["T4"].pk,
        "priority": "background",
        "accepted_warnings": [one.split('"')[0] for one in accepted],
    }
    assert as_alice.post(reverse("run-new"), started).status_code == 302
    run = Run.objects.get()
    assert (run.pool, run.priority) == (cards["T4"], "background")


def test_method_costs_are_updated_when_the_pool_changes(as_alice, form):
    page = as_alice.post(reverse("run-settings"), form).content.decode()
    assert "change from:#pool" in page, (
        "otherwise the methods stay grayed out as for the first pool"
    )


def test_the_default_is_the_largest_gpu_with_the_most_free_memory(as_alice, form, cards):
    assert "H100, 79.0 of 80.0 GB free" in render_summary(as_alice, form)
    assert (get_target_device().kind, get_target_device(cards["CPU"]).kind) == ("cuda", "cpu")


def test_a_copy_has_the_pool_and_priority_of_its_original(as_alice, run, cards):
    Run.objects.update(pool=cards["T4"], priority="background")
    page = normalize_markup(as_alice.get(f"{reverse('run-new')}?from={run.pk}"))
    assert f'value="{cards["T4"].pk}" selected' in page and 'value="background" selected' in page


def test_an_unschedulable_device_is_shown_as_such(as_alice, form, cards):
    Device.objects.filter(name="T4").update(condition="dirty")
    assert "not schedulable now" in render_summary(as_alice, form | {"pool": cards["T4"].pk})


def test_the_local_device_is_shown_until_a_worker_has_reported(as_alice, form, db):
    assert Device.objects.count() == 0
    assert devices.read_devices()[0].name in render_summary(as_alice, form)


def test_only_admins_can_set_the_priority_urgent(alice, people, base_model, data, device, no_queue):
    launch_fields = {
        "base_model": base_model,
        "data": data,
        "settings": tiny.SETTINGS,
        "placement": Placement(priority="urgent"),
    }
    with pytest.raises(NotAllowed):
        launch_run(alice, **launch_fields)
    assert not Run.objects.exists()
    assert launch_run(people["admin"], **launch_fields).priority == "urgent"


def test_an_unknown_priority_or_pool_is_rejected_at_its_field(as_alice, form, device):
    for field, value in (("priority", "royal"), ("pool", "99")):
        response = as_alice.post(reverse("run-new"), form | {field: value})
        assert response.status_code in (400, 404)
        assert response.context["error"].field == field
    assert not Run.objects.exists()


def test_every_run_of_a_sweep_has_the_pool_and_priority(
    as_alice, base_model, data, cards, no_queue
):
    body = {
        "model": base_model.pk,
        "data": data.pk,
        "settings": {**tiny.SETTINGS, "rank": [2, 4]},
        "accept_warnings": True,
    }
    more = {"pool": cards["T4"].pk, "priority": "background"}
    answer = as_alice.post("/api/v1/runs/sweeps", body | more, content_type="application/json")
    assert answer.status_code == 201, answer.content
    assert set(Sweep.objects.get().runs.values_list("pool", "priority")) == {
        (cards["T4"].pk, "background")
    }


def test_settings_with_most_effect_on_memory_have_a_slider(as_alice, form):
    page = as_alice.post(reverse("run-settings"), form | {"rank": "24"}).content.decode()
    slider = page[page.index('data-slides="rank"') :].split(">")[0]
    assert 'data-values="1,2,4,8,16,32,64,128,256"' in slider
    assert 'value="4"' in slider, "16 is as near as 32, and comes first"
    assert 'data-slides="max_length"' in page and 'data-slides="max_tokens_per_batch"' in page
    assert (
        'data-slides="rank"'
        not in as_alice.post(reverse("run-settings"), form | {"method": "full"}).content.decode()
    )


def test_each_method_shows_its_recommended_rates_and_its_limitations(as_alice, form):
    from training.runs.launch import settings_form as form_module

    page = as_alice.post(reverse("run-settings"), form | {"method": "full"}).content.decode()
    assert "Recommended: 5e-6 to 5e-5." in page
    page = as_alice.post(reverse("run-settings"), form | {"method": "prefix"}).content.decode()
    for title, reason in form_module.list_unsupported_features({"method": "prefix"}):
        assert f"<b>{title}:</b> {reason}" in html.unescape(page)
    assert "Gradient checkpointing" in page and "Merging into the base" in page


def test_every_field_has_a_recommended_range():
    from training.engine.methods import METHODS
    from training.runs.launch.settings_form import build_fields

    for method in METHODS:
        for name, field in build_fields({"method": method}).items():
            assert (
                field.recommended
                or name == "seed"
                or (field.choices and not field.papers)
                or name == "optim"
            ), name


def test_virtual_tokens_count_toward_the_context_length(base_model):
    from training.engine.config import RunConfig
    from training.runs.forecast.summary import get_context_warnings

    base_model.metadata = {"context_length": 256}
    batch = {"max_tokens_per_batch": 512, "max_length": 256}
    assert not get_context_warnings(RunConfig.from_dict({"method": "lora", **batch}), base_model)
    (warning,) = get_context_warnings(
        RunConfig.from_dict({"method": "prompt", **batch}), base_model
    )
    assert_mentions(warning, 256, "20 virtual tokens")
