"""A setting with several values spans a grid of runs. All of them are checked and started, or
none.
"""

import pytest

from tests import tiny
from tests.launching import launch_run
from tests.user_errors import raises_user_error
from training.errors import ConfigError, TooLarge
from training.runs.launch.sweep import expand_grid, split_grid
from training.runs.models import Run, Sweep

pytestmark = pytest.mark.django_db


def test_a_grid_starts_every_combination(alice, base_model, data, no_queue):
    settings = {**tiny.SETTINGS, "rank": [2, 4], "learning_rate": [0.01, 0.001, 0.0001]}
    sweep = launch_run(alice, base_model=base_model, data=data, settings=settings, name="Grid")
    runs = list(sweep.runs.order_by("pk"))
    assert [(run.config["rank"], run.config["learning_rate"]) for run in runs] == [
        (2, 0.01), (2, 0.001), (2, 0.0001), (4, 0.01), (4, 0.001), (4, 0.0001),
    ]  # fmt: skip
    assert runs[0].name == "Grid: rank 2, learning_rate 0.01"
    assert sweep.team == runs[0].team


def test_duplicate_values_count_once():
    assert split_grid({"rank": [4, 4], "alpha": [8, 16, 8]}) == ({"rank": 4}, {"alpha": [8, 16]})


def test_too_many_runs_are_rejected_with_their_number():
    with raises_user_error(TooLarge, field="rank", naming=["10 x 10", 100, 60]):
        expand_grid({"rank": list(range(1, 11)), "alpha": list(range(1, 11))})


def test_one_invalid_member_rejects_the_whole_sweep(alice, base_model, data, no_queue):
    with raises_user_error(ConfigError, field="rank", naming=[0]):
        launch_run(
            alice, base_model=base_model, data=data, settings={**tiny.SETTINGS, "rank": [4, 0]}
        )
    assert (Run.objects.count(), Sweep.objects.count()) == (0, 0)


@pytest.mark.parametrize("values", [[[1], [2]], [{}, {}], [None, 1]])
def test_values_that_are_not_scalars_are_rejected(values):
    with raises_user_error(ConfigError, field="rank"):
        expand_grid({"rank": values})


def post_launch_form(client, base_model, data, **more):
    settings = {name: str(value) for name, value in tiny.SETTINGS.items() if name != "precision"}
    return client.post(
        "/runs/new",
        {"model": base_model.pk, "data": data.pk, **settings, "precision": "fp32", **more},
    )


def test_the_page_starts_a_sweep_and_shows_it(as_alice, base_model, data, no_queue):
    answer = post_launch_form(as_alice, base_model, data, rank="2, 4", learning_rate="0.001")
    assert answer["Location"] == f"/sweeps/{Sweep.objects.get().pk}"
    page = as_alice.get(answer["Location"]).content.decode()
    assert page.count('name="run"') == 2
    as_alice.post(answer["Location"] + "/stop")
    assert set(Run.objects.values_list("state", flat=True)) == {"cancelled"}


def test_the_summary_counts_the_runs_of_the_grid(as_alice, base_model, data):
    page = as_alice.post(
        "/runs/new/summary",
        {"model": base_model.pk, "data": data.pk, "rank": "2, 4, 8", "alpha": "8, 16, 32, 64"},
    ).content.decode()
    assert "Start 12 runs" in page


def test_other_users_cannot_see_a_sweep(client, people, alice, base_model, data, no_queue):
    sweep = launch_run(
        alice, base_model=base_model, data=data, settings={**tiny.SETTINGS, "rank": [2, 4]}
    )
    client.force_login(people["mallory"])
    assert client.get(f"/sweeps/{sweep.pk}").status_code == 404
