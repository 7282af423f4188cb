"""Curves of long runs have few points and lose no spike."""

import random

import numpy as np
import pytest

from tests.runs.large_runs import write_long_run
from training.runs.metrics.curves import read_curves
from training.runs.models import CurveChunk

pytestmark = pytest.mark.django_db


def test_a_hundred_spikes_are_visible_in_buckets_and_exact_when_zoomed_in(run):
    spikes = sorted(random.Random(1).sample(range(1, 100_001), 100))
    write_long_run(run, steps=100_000, spikes=spikes, height=50.0)
    afar = read_curves(run.pk, ["loss"], points=1000)
    assert len(afar.axes["step"]) <= 1000
    assert afar.points == 100_000
    mean, high = afar.series["loss"][2], afar.series["loss"][1]
    first, last = np.r_[0, afar.axes["step"][:-1]], afar.axes["step"]
    edge = (last[1] - last[0]) if len(last) > 1 else 1
    for spike in spikes:
        near = np.abs(last - spike) <= edge
        assert (high[near] >= 50).any()
    assert mean.max() < 50
    assert (first <= last).all()
    near = read_curves(
        run.pk, ["loss"], points=1000, first_step=spikes[7] - 3, last_step=spikes[7] + 3
    )
    assert near.raw
    assert near.series["loss"][0].tolist()[3] == 50.0
    assert near.axes["step"].tolist() == list(range(spikes[7] - 3, spikes[7] + 4))


def test_a_zoomed_range_is_bucketed_from_its_points(run):
    write_long_run(run, steps=20_000, spikes=[7_777], height=9.0)
    curves = read_curves(run.pk, ["loss"], points=500, first_step=5_001, last_step=15_000)
    assert not curves.raw
    assert curves.points == 10_000
    assert curves.series["loss"][1].max() == 9.0


def test_few_points_are_returned_unchanged(run):
    write_long_run(run, steps=700, spikes=[], height=0)
    curves = read_curves(run.pk, points=1000)
    assert curves.raw
    assert curves.axes["step"].tolist() == list(range(1, 701))
    assert CurveChunk.objects.filter(run=run).count() == 1


def test_a_run_without_steps_has_empty_curves(run):
    curves = read_curves(run.pk)
    assert curves.points == 0
    assert curves.to_lists()["series"]["loss"] == {"mean": []}


def test_superseded_chunks_are_left_out(run):
    write_long_run(run, steps=1024, spikes=[], height=0)
    CurveChunk.objects.filter(run=run, first_step=513).update(superseded=True)
    assert read_curves(run.pk).points == 512
