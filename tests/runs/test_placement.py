"""A person chooses the devices and the class at launch; the forecast is for those devices, whatever
the web server has.
"""

import pytest
from django.urls import reverse

from tests import tiny
from tests.launching import launch_run
from tests.pages import normalize_markup
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
    """Two pools beside this host's CPU, on a host of their own."""
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


def render_card(client, form):
    return client.post(reverse("run-summary"), form).content.decode()


def test_it_works(as_alice, form, cards, no_queue):
    page = normalize_markup(as_alice.get(reverse("run-new")))
    assert "The largest" in page and ">T4</option>" in page and ">Urgent<" not in page
    card = render_card(as_alice, form | {"pool": cards["T4"].pk})
    assert "T4, 15.0 of 16.0 GB free" in card
    accepted = card.split('name="accepted_warnings" value="')[1:]
    started = form | {
        "pool": cards["T4"].pk,
        "priority": "background",
        "accepted_warnings": [one.split('"')[0] for one in accepted],
    }
    assert as_alice.post(reverse("run-new"), started).status_code == 302
    run = Run.objects.get()
    assert (run.pool, run.priority) == (cards["T4"], "background")


def test_the_techniques_are_weighed_anew_for_other_devices(as_alice, form):
    page = as_alice.post(reverse("run-settings"), form).content.decode()
    assert "change from:#pool" in page, (
        "else they would stay greyed, or not, as the first devices had it"
    )


def test_without_a_choice_it_is_the_largest_card_and_its_emptiest(as_alice, form, cards):
    assert "H100, 79.0 of 80.0 GB free" in render_card(as_alice, form)
    assert (get_target_device().kind, get_target_device(cards["CPU"]).kind) == ("cuda", "cpu")


def test_a_copy_waits_where_its_original_did(as_alice, run, cards):
    Run.objects.update(pool=cards["T4"], priority="background")
    page = normalize_markup(as_alice.get(f"{reverse('run-new')}?from={run.pk}"))
    assert f'value="{cards["T4"].pk}" selected' in page and 'value="background" selected' in page


def test_devices_that_are_not_given_out_are_told(as_alice, form, cards):
    Device.objects.filter(name="T4").update(condition="dirty")
    assert "not given out now" in render_card(as_alice, form | {"pool": cards["T4"].pk})


def test_before_any_worker_reports_this_hosts_own_device_is_shown(as_alice, form, db):
    assert Device.objects.count() == 0
    assert devices.read_devices()[0].name in render_card(as_alice, form)


def test_the_class_urgent_is_granted_by_admins(alice, people, base_model, data, device, no_queue):
    launch_fields = {
        "base_model": base_model,
        "data": data,
        "settings": tiny.SETTINGS,
        "placement": Placement(priority="urgent"),
    }
    with pytest.raises(NotAllowed):
        launch_run(alice, **launch_fields)
    assert not Run.objects.exists(), "nothing is left of a refused launch"
    assert launch_run(people["admin"], **launch_fields).priority == "urgent"


def test_a_wrong_class_or_devices_that_are_gone_are_a_sentence_at_their_field(
    as_alice, form, device
):
    for more, message in (
        ({"priority": "royal"}, "The class is one of"),
        ({"pool": "99"}, "not there any more"),
    ):
        answer = as_alice.post(reverse("run-new"), form | more)
        assert answer.status_code in (400, 404) and message in answer.content.decode()
    assert not Run.objects.exists()


def test_every_run_of_a_sweep_waits_there(as_alice, base_model, data, cards, no_queue):
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


def test_what_moves_memory_has_a_slider_beside_its_field(as_alice, form):
    page = as_alice.post(reverse("run-settings"), form | {"rank": "24"}).content.decode()
    slider = page[page.index('data-slides="rank"') :].split(">")[0]
    assert 'data-values="1,2,4,8,16,32,64,128,256"' in slider
    assert 'value="4"' in slider, "16 is as near as 32, and comes first"
    assert 'data-slides="max_length"' in page and 'data-slides="max_tokens_per_batch"' in page
    assert (
        'data-slides="rank"'
        not in as_alice.post(reverse("run-settings"), form | {"method": "full"}).content.decode()
    )


def test_each_technique_tells_its_usual_rates_and_what_it_cannot_do(as_alice, form):
    page = as_alice.post(reverse("run-settings"), form | {"method": "full"}).content.decode()
    assert "Usual: 5e-6 to 5e-5." in page
    page = as_alice.post(reverse("run-settings"), form | {"method": "prefix"}).content.decode()
    assert "<b>Gradient checkpointing:</b> The prefix is stored in the KV cache" in page
    assert "<b>Merging into the base:</b> A prefix is not an update of weights." in page


def test_every_setting_that_one_may_turn_has_its_usual_range():
    from training.engine.methods import METHODS
    from training.runs.launch.form import build_fields

    for method in METHODS:
        for name, field in build_fields({"method": method}).items():
            assert (
                field.recommended
                or name == "seed"
                or (field.choices and not field.papers)
                or name == "optim"
            ), name


def test_virtual_tokens_count_against_the_context(base_model):
    from training.engine.config import RunConfig
    from training.runs.forecast.summary import get_context_warnings

    base_model.metadata = {"context_length": 256}
    batch = {"max_tokens_per_batch": 512, "max_length": 256}
    assert not get_context_warnings(RunConfig.from_dict({"method": "lora", **batch}), base_model)
    (warning,) = get_context_warnings(
        RunConfig.from_dict({"method": "prompt", **batch}), base_model
    )
    assert "max_length is 256 and 20 virtual tokens stand in front" in warning
