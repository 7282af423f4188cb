"""A new metric is one row of the table; journal, chunks, curves, exports and pages include it."""

import csv
import io
import json
import re

import numpy as np
import pytest

from tests.runs.journals import Journal as Lines
from tests.runs.journals import step_event
from tests.runs.large_runs import write_long_run
from training.engine.events import Journal
from training.engine.metrics import METRICS, Metric
from training.runs.live.messages import build_snapshot, read_events_after
from training.runs.metrics.chunks import CHUNK_SIZE
from training.runs.metrics.curves import read_curves
from training.runs.metrics.table import encode_parquet, stream_csv
from training.runs.metrics.trackers import iter_metrics
from training.runs.models import CurveChunk, Run
from training.runs.worker.ingest import store_events
from training.runs.worker.lease import claim_run


@pytest.fixture
def entropy(monkeypatch):
    metric = Metric("entropy", "Entropy", "nats/token", decimals=3, chart="Entropy")
    monkeypatch.setitem(METRICS, metric.name, metric)
    return metric


@pytest.fixture
def trained(run, entropy):
    """A run with a chunk and some rows, each step with its entropy."""
    events = Lines().lines(*[step_event(n, entropy=n / 8) for n in range(1, CHUNK_SIZE + 4)])
    lease = claim_run(run.pk)
    run.refresh_from_db()
    store_events(lease, run, events, 1)
    return Run.objects.get(pk=run.pk)


def test_the_journal_accepts_only_metrics_of_the_table(tmp_path, monkeypatch):
    journal = Journal(tmp_path)
    with pytest.raises(ValueError, match="not declared"):
        journal.write_event("step", step=1, entropy=0.5)
    monkeypatch.setitem(METRICS, "entropy", Metric("entropy", "Entropy"))
    journal.write_event("step", step=1, entropy=0.5)
    with pytest.raises(ValueError, match="not declared"):
        journal.write_event("eval", step=1, entropy=0.5)
    assert json.loads(journal.path.read_text())["entropy"] == 0.5


@pytest.mark.django_db
def test_chunks_store_a_new_metric(trained):
    assert CurveChunk.objects.get(run=trained).columns.get(name="entropy").high == CHUNK_SIZE / 8
    events = read_events_after(trained.pk, 0, 1000)
    assert [event.fields["entropy"] for event in events] == [
        n / 8 for n in range(1, CHUNK_SIZE + 4)
    ]


@pytest.mark.django_db
def test_a_new_metric_has_a_curve_in_snapshot_and_api(trained, as_alice):
    assert read_curves(trained.pk).series["entropy"][2][7] == 1.0
    assert "entropy" in build_snapshot(trained.pk, 100)["curves"]["series"]
    curves = as_alice.get(f"/api/v1/runs/{trained.pk}/metrics?names=entropy").json()
    assert list(curves["series"]) == ["entropy"]
    assert curves["series"]["entropy"]["mean"][-1] == (CHUNK_SIZE + 3) / 8


@pytest.mark.django_db
def test_tables_and_trackers_have_a_new_metric(trained):
    rows = list(csv.DictReader(io.StringIO(b"".join(stream_csv(trained)).decode())))
    assert [float(row["entropy"]) for row in rows] == [n / 8 for n in range(1, CHUNK_SIZE + 4)]
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(io.BytesIO(encode_parquet(trained)))
    assert table.column("entropy")[-1].as_py() == (CHUNK_SIZE + 3) / 8
    assert [metrics["entropy"] for _, _, metrics in iter_metrics(trained)][:2] == [1 / 8, 2 / 8]


@pytest.mark.django_db
def test_pages_contain_the_table_of_metrics_for_their_scripts(trained, as_alice):
    other = Run.objects.get(pk=trained.pk)
    other.pk = None
    other.save()
    pages = (f"/runs/{trained.pk}", f"/runs/compare?run={trained.pk}&run={other.pk}")
    for address in pages:
        page = as_alice.get(address).content.decode()
        script = re.search(r'<script id="metrics" type="application/json">(.*?)</script>', page)
        row = json.loads(script[1])[-1]
        assert (row["name"], row["chart"], row["event"]) == ("entropy", "Entropy", "step")
    assert '<option value="entropy">entropy</option>' in page


@pytest.mark.django_db
@pytest.mark.parametrize("steps", [700, 20_000])
def test_a_run_older_than_a_metric_has_a_gap_there_and_its_other_curves(run, monkeypatch, steps):
    write_long_run(run, steps=steps, spikes=[], height=0)
    monkeypatch.setitem(METRICS, "entropy", Metric("entropy", "Entropy", chart="Entropy"))
    for points in (100, 1000):
        curves = read_curves(run.pk, points=points)
        assert np.isnan(curves.series["entropy"][2]).all()
        assert np.isfinite(curves.series["loss"][2]).all()
        assert len(curves.series["entropy"][2]) == len(curves.axes["step"])
    assert len(list(csv.DictReader(io.StringIO(b"".join(stream_csv(run)).decode())))) == steps


@pytest.mark.django_db
def test_the_mean_of_a_bucket_ignores_gaps(run):
    write_long_run(run, steps=100 * CHUNK_SIZE, spikes=[], height=0)
    without = CurveChunk.objects.filter(run=run, first_step=1).get()
    without.columns.filter(name="gradient_norm").delete()
    means = read_curves(run.pk, ["gradient_norm"], points=10).series["gradient_norm"][2]
    assert means.tolist() == [1.0] * 10
