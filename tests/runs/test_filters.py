"""The list of runs: filters, sort order and pages from an allow-list, and the actions on runs."""

import pytest

from tests.user_errors import raises_user_error
from training.errors import Conflict, NotAllowed, UserError
from training.runs import actions
from training.runs.filters import SORT_COLUMNS, RunFilters, filter_runs
from training.runs.models import Run

pytestmark = pytest.mark.django_db


@pytest.fixture
def several(run, people):
    """Four runs with different states, owners and names."""
    runs = [run]
    for name, state, owner, loss in (
        ("Beta", "finished", "alice", 0.5),
        ("Gamma", "failed", "bob", None),
        ("Delta", "finished", "mallory", 0.1),
    ):
        copy = Run.objects.get(pk=run.pk)
        copy.pk, copy.name, copy.state, copy.owner, copy.best_eval_loss = (
            None,
            name,
            state,
            people[owner],
            loss,
        )
        copy.team = None if owner == "mallory" else run.team
        copy.save()
        runs.append(copy)
    return runs


def run_names(user, **query):
    return [row.name for row in filter_runs(user, RunFilters.from_query(query))]


def test_the_list_has_the_visible_runs_newest_first(several, alice):
    assert run_names(alice) == ["Gamma", "Beta", "Lights, tiny"]


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ({"state": "finished"}, ["Beta"]),
        ({"owner": "bob"}, ["Gamma"]),
        ({"model": "tiny-llama"}, ["Gamma", "Beta", "Lights, tiny"]),
        ({"data": "nothing"}, []),
        ({"method": "lora", "q": "light"}, ["Lights, tiny"]),
        ({"q": "keep me"}, ["Beta"]),
        ({"tag": "good one"}, ["Beta"]),
        ({"tag": "good"}, []),
        ({"archived": "1"}, ["Archived"]),
        ({"sort": "name"}, ["Beta", "Gamma", "Lights, tiny"]),
        ({"sort": "eval_loss"}, ["Beta", "Gamma", "Lights, tiny"]),
        ({"sort": "-eval_loss"}, ["Beta", "Gamma", "Lights, tiny"]),
    ],
)
def test_filters_and_order(several, alice, query, expected):
    Run.objects.filter(name="Beta").update(tags=",good one,", notes="please keep me")
    copy = Run.objects.get(name="Beta")
    copy.pk, copy.name, copy.archived_at = None, "Archived", copy.created_at
    copy.save()
    order = run_names(alice, **query)
    assert sorted(order) == sorted(expected)
    if "sort" in query:
        assert order[0] == expected[0]


@pytest.mark.parametrize(
    "query", [{"sort": "owner__password"}, {"sort": "?"}, {"state": "x"}, {"sort": "--name"}]
)
def test_unknown_columns_and_states_are_rejected(query):
    with pytest.raises(UserError):
        RunFilters.from_query(query)


def test_unknown_parameters_are_not_filters(several, alice, as_alice):
    assert run_names(alice, owner__password__startswith="pbkdf2") == run_names(alice)
    assert as_alice.get("/?owner__username=bob").status_code == 200


@pytest.mark.parametrize("sort", sorted(SORT_COLUMNS))
def test_every_column_sorts_both_ways(several, as_alice, sort):
    for order in (sort, f"-{sort}"):
        assert as_alice.get(f"/?sort={order}").status_code == 200


def test_name_tags_and_notes_of_a_run_are_changed(run, as_alice):
    as_alice.post(
        f"/runs/{run.pk}/edit",
        {"name": "New", "tags": "one, two, one,", "notes": "Remember.\nThis."},
    )
    run.refresh_from_db()
    assert (run.name, run.tag_list, run.notes) == ("New", ["one", "two"], "Remember.\nThis.")
    assert "Remember." in as_alice.get(f"/runs/{run.pk}").content.decode()


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"name": "  "}, "name"),
        ({"tags": "<b>"}, "tags"),
        ({"tags": ",".join(map(str, range(20)))}, "tags"),
        ({"notes": "x" * 10_001}, "notes"),
    ],
)
def test_an_invalid_name_tag_or_note_is_rejected(run, alice, change, field):
    with pytest.raises(UserError) as caught:
        actions.update_run(alice, run, **change)
    assert caught.value.field == field


def test_archived_runs_are_hidden_until_they_are_restored(several, as_alice, alice):
    done = several[1]
    as_alice.post("/runs/archive", {"run": [done.pk, several[0].pk, several[2].pk]})
    assert run_names(alice) == ["Gamma", "Lights, tiny"]  # bob's, and one that is not over, stay
    as_alice.post(f"/runs/{done.pk}/archive", {"restore": "1"})
    assert "Beta" in run_names(alice)


def test_deleting_needs_the_name_and_an_ended_run_and_frees_the_disk(run, alice, people):
    with raises_user_error(field="name", naming=("Lights, tiny",)):
        actions.delete_run(alice, run, "Lights")
    with raises_user_error(Conflict, naming=(run.name,)):
        actions.delete_run(alice, run, run.name)
    Run.objects.filter(pk=run.pk).update(state="failed")
    with pytest.raises(NotAllowed):
        actions.delete_run(people["bob"], run, run.name)
    assert actions.delete_run(alice, run, run.name) > 0
    assert not run.folder.exists()
    assert not Run.objects.exists()


def test_two_thousand_runs_need_no_query_per_row(run, as_alice, django_assert_max_num_queries):
    copies = []
    for i in range(2000):
        copy = (
            Run.objects.get(pk=run.pk)
            if not copies
            else Run(
                **{f.attname: getattr(copies[0], f.attname) for f in Run._meta.concrete_fields}
            )
        )
        copy.pk, copy.name = None, f"Run {i}"
        copies.append(copy)
    Run.objects.bulk_create(copies)
    with django_assert_max_num_queries(18):
        page = as_alice.get("/").content.decode()
    assert "1 to 50 of 2,001" in page
