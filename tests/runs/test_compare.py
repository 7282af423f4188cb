"""Comparisons of runs, and their metrics as files and in other trackers."""

import csv
import io

import pyarrow.parquet
import pytest
from django.core.management import CommandError, call_command

from tests.runs.journals import Journal, step_event
from training.runs.metrics.comparison import compare_figures, compare_settings
from training.runs.metrics.table import iter_steps, stream_csv
from training.runs.models import Run
from training.runs.worker.ingest import store_events
from training.runs.worker.lease import claim_run

pytestmark = pytest.mark.django_db


@pytest.fixture
def trained(run):
    """A run of 600 steps (one chunk of 512 and the rest as rows) with two evaluations."""
    lease, journal = claim_run(run.pk), Journal()
    run.refresh_from_db()
    evals = [
        {
            "kind": "eval",
            "step": n,
            "eval_loss": 2.0 - n / 600,
            "perplexity": 5.0,
            "rows": 4,
            "seconds": 0.1,
            "best": True,
            "total_tokens": n,
        }
        for n in (0, 600)
    ]
    lines = [
        *journal.lines(evals[0]),
        *journal.lines(*[step_event(n, loss=3.0 - n / 600) for n in range(1, 601)]),
        *journal.lines(evals[1]),
    ]
    store_events(lease, run, lines, 10)
    run.refresh_from_db()
    return run


def test_different_settings_are_listed_with_dotted_names():
    rows = compare_settings(
        [{"a": 1, "b": {"c": 2, "d": 3}}, {"a": 1, "b": {"c": 9, "d": 3}, "e": 4}]
    )
    assert [(name, values) for name, values, differs in rows if differs] == [
        ("b.c", [2, 9]),
        ("e", [None, 4]),
    ]


def test_the_best_value_of_a_figure_is_marked_unless_all_are_equal():
    table = {
        figure.name: cells
        for figure, cells in compare_figures(
            [
                {"loss": 1.0, "step": 5, "tokens_per_second": 7.0},
                {"loss": 1.0, "step": 9, "tokens_per_second": 9.0},
            ]
        )
    }
    assert table["loss"] == [(1.0, False), (1.0, False)]
    assert table["tokens_per_second"] == [(7.0, False), (9.0, True)]
    assert table["step"] == [(5, False), (9, False)]


def test_the_page_compares_two_to_ten(as_alice, trained, run):
    other = Run.objects.get(pk=run.pk)
    other.pk, other.name, other.config = None, "<b>Other</b>", {**run.config, "rank": 99}
    other.save()
    page = as_alice.get(f"/runs/compare?run={run.pk}&run={other.pk}").content.decode()
    assert '<td class="number">99</td>' in page
    assert "<b>Other</b>" not in page
    assert as_alice.get(f"/runs/compare?run={run.pk}").status_code == 400
    assert (
        as_alice.get("/runs/compare?" + "&".join(f"run={i}" for i in range(1, 13))).status_code
        == 400
    )
    assert as_alice.get(f"/runs/compare?run={run.pk}&run=999999").status_code == 404


def test_a_comparison_needs_access_to_every_run(client, people, trained, run):
    client.force_login(people["mallory"])
    assert client.get(f"/runs/compare?run={run.pk}&run={trained.pk + 1}").status_code == 404


def test_every_step_is_in_the_table_once_in_order(trained):
    rows = list(iter_steps(trained))
    assert [row["step"] for row in rows] == list(range(601))
    assert rows[600]["eval_loss"] == 1.0
    assert rows[1]["loss"] == pytest.approx(3.0 - 1 / 600)


def test_csv_and_parquet_hold_the_same_numbers(as_alice, trained):
    answer = as_alice.get(f"/runs/{trained.pk}/metrics.csv")
    rows = list(csv.DictReader(io.StringIO(b"".join(stream_csv(trained)).decode())))
    table = pyarrow.parquet.read_table(
        io.BytesIO(as_alice.get(f"/runs/{trained.pk}/metrics.parquet").content)
    )
    assert len(rows) == table.num_rows == 601
    assert float(rows[300]["loss"]) == table.column("loss")[300].as_py()
    assert answer["Content-Disposition"] == f'attachment; filename="run-{trained.pk}.csv"'


def test_the_api_returns_evaluations(as_alice, trained):
    evals = as_alice.get(f"/api/v1/runs/{trained.pk}/evals").json()["evals"]
    assert [(e["step"], e["eval_loss"], e["total_tokens"]) for e in evals] == [
        (0, 2.0, 0),
        (600, 1.0, 600),
    ]


def test_the_best_eval_loss_and_its_step_are_recorded(trained):
    assert (trained.best_eval_loss, trained.best_step) == (1.0, 600)


def test_tensorboard_reads_an_export(trained, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    call_command("export", trained.pk, str(tmp_path), to="tensorboard", stdout=io.StringIO())
    accumulator = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0})
    accumulator.Reload()
    assert [event.step for event in accumulator.Scalars("loss")] == list(range(1, 601))
    assert accumulator.Scalars("eval_loss")[-1].value == 1.0


def test_mlflow_reads_an_export(trained, tmp_path, monkeypatch):
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    out = io.StringIO()
    call_command("export", trained.pk, f"file://{tmp_path}", to="mlflow", stdout=out)
    run_id = out.getvalue().split()[-1].rstrip(".")
    client = MlflowClient(f"file://{tmp_path}")
    assert len(client.get_metric_history(run_id, "loss")) == 600
    assert client.get_run(run_id).data.params["rank"] == "4"


def test_wandb_writes_a_run_offline(trained, tmp_path, monkeypatch):
    for name, value in (
        ("WANDB_MODE", "offline"),
        ("WANDB_DIR", str(tmp_path)),
        ("WANDB_SILENT", "true"),
        ("HOME", str(tmp_path)),
    ):
        monkeypatch.setenv(name, value)
    call_command("export", trained.pk, "snapml-test", to="wandb", stdout=io.StringIO())
    assert list(tmp_path.rglob("*.wandb"))


def test_a_tracker_that_is_not_installed_gives_an_error(trained, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto.event_pb2", None)
    with pytest.raises(CommandError, match=r"pip install 'snapml\[tensorboard\]'"):
        call_command("export", trained.pk, str(tmp_path), to="tensorboard")


def test_losses_of_different_base_models_have_no_best_value():
    runs = [
        {"base": 1, "eval_loss": 1.0, "peak_memory_bytes": 5},
        {"base": 2, "eval_loss": 2.0, "peak_memory_bytes": 9},
    ]
    best_by_figure = {
        figure.name: [best for _, best in cells] for figure, cells in compare_figures(runs)
    }
    assert best_by_figure == {"eval_loss": [False, False], "peak_memory_bytes": [True, False]}


def test_device_time_is_compared_only_for_ended_runs(trained, run):
    from django.utils import timezone

    from training.runs.status import get_comparison_figures

    assert get_comparison_figures(Run.objects.get(pk=run.pk))["device_seconds"] is None
    Run.objects.filter(pk=run.pk).update(finished_at=timezone.now())
    assert get_comparison_figures(Run.objects.get(pk=run.pk))["device_seconds"] is not None
