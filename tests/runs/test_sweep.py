"""Several values for a setting span a grid: counted, checked whole, started whole."""

import pytest

from tests import tiny
from tests.launching import launch_run
from training.errors import ConfigError, TooLarge
from training.runs.launch.sweep import expand_grid, split_grid
from training.runs.models import Run, Sweep

pytestmark = pytest.mark.django_db


def test_it_works(alice, base_model, data, no_queue):
    settings = {**tiny.SETTINGS, "rank": [2, 4], "learning_rate": [0.01, 0.001, 0.0001]}
    sweep = launch_run(alice, base_model=base_model, data=data, settings=settings, name="Grid")
    runs = list(sweep.runs.order_by("pk"))
    assert [(run.config["rank"], run.config["learning_rate"]) for run in runs] == [
        (2, 0.01), (2, 0.001), (2, 0.0001), (4, 0.01), (4, 0.001), (4, 0.0001),
    ]  # fmt: skip
    assert runs[0].name == "Grid: rank 2, learning_rate 0.01"
    assert sweep.team == runs[0].team


def test_a_value_that_is_named_twice_counts_once():
    assert split_grid({"rank": [4, 4], "alpha": [8, 16, 8]}) == ({"rank": 4}, {"alpha": [8, 16]})


def test_too_many_runs_are_refused_with_their_number():
    with pytest.raises(TooLarge, match=r"10 x 10 = 100 runs; a sweep has at most 60"):
        expand_grid({"rank": list(range(1, 11)), "alpha": list(range(1, 11))})


def test_one_wrong_member_refuses_all(alice, base_model, data, no_queue):
    with pytest.raises(ConfigError, match="rank is 0"):
        launch_run(
            alice, base_model=base_model, data=data, settings={**tiny.SETTINGS, "rank": [4, 0]}
        )
    assert (Run.objects.count(), Sweep.objects.count()) == (0, 0)


@pytest.mark.parametrize("values", [[[1], [2]], [{}, {}], [None, 1]])
def test_values_that_are_none_are_named(values):
    with pytest.raises(ConfigError, match="rank is"):
        expand_grid({"rank": values})


def post_launch_form(client, base_model, data, **more):
    settings = {name: str(value) for name, value in tiny.SETTINGS.items() if name != "precision"}
    return client.post(
        "/runs/new",
        {"model": base_model.pk, "data": data.pk, **settings, "precision": "fp32", **more},
    )


def test_the_page_starts_one_and_shows_it(as_alice, base_model, data, no_queue):
    answer = post_launch_form(as_alice, base_model, data, rank="2, 4", learning_rate="0.001")
    assert answer["Location"] == f"/sweeps/{Sweep.objects.get().pk}"
    page = as_alice.get(answer["Location"]).content.decode()
    assert page.count('name="run"') == 2
    as_alice.post(answer["Location"] + "/stop")
    assert set(Run.objects.values_list("state", flat=True)) == {"cancelled"}


def test_the_card_counts_the_grid(as_alice, base_model, data):
    page = as_alice.post(
        "/runs/new/summary",
        {"model": base_model.pk, "data": data.pk, "rank": "2, 4, 8", "alpha": "8, 16, 32, 64"},
    ).content.decode()
    assert "12 runs; start?" in page


def test_a_stranger_sees_no_sweep(client, people, alice, base_model, data, no_queue):
    sweep = launch_run(
        alice, base_model=base_model, data=data, settings={**tiny.SETTINGS, "rank": [2, 4]}
    )
    client.force_login(people["mallory"])
    assert client.get(f"/sweeps/{sweep.pk}").status_code == 404
