"""The charts of a run and of a comparison, drawn from the table of metrics."""

import re

import pytest
from playwright.sync_api import expect

from training.engine.metrics import METRICS

pytestmark = pytest.mark.browser
CHARTED = [metric for metric in METRICS.values() if metric.chart]
SETTINGS = {"max_steps": 12, "max_tokens_per_batch": 160, "max_length": 80, "eval_steps": 4}
CHART = """chart => ({
    rows: chart.layout.annotations.map(one => one.text),
    axes: Object.keys(chart.layout).filter(key => key.startsWith("yaxis")).length,
    points: Object.fromEntries(
        chart.data.map(line => [line.name, line.y.filter(Number.isFinite).length])
    ),
})"""


def has_finished(instance, run):
    state = instance.call_api("GET", f"/runs/{run}")["state"]
    assert state["state"] not in ("failed", "stopped"), state["message"]
    return state["state"] == "finished"


@pytest.fixture(scope="module")
def finished(instance):
    """Two runs of the tiny model that have ended."""
    models, data = instance.call_api("GET", "/models"), instance.call_api("GET", "/datasets")
    body = {
        "model": models["items"][0]["id"],
        "data": data["items"][0]["versions"][0]["id"],
        "settings": SETTINGS,
        "accept_warnings": True,
    }
    runs = [
        instance.call_api("POST", "/runs", body | {"name": name})["id"] for name in ("One", "Two")
    ]
    for run in runs:
        instance.wait_for(lambda run=run: has_finished(instance, run), 300)
    return runs


def test_a_run_page_has_a_row_for_every_chart_of_the_metrics_table(page, instance, finished):
    page.goto(f"{instance.address}/runs/{finished[0]}")
    chart = page.locator("#chart[data-ready]")
    expect(chart).to_be_visible()
    drawn = chart.evaluate(CHART)
    charts = {metric.chart for metric in CHARTED}
    assert charts <= set(drawn["rows"])
    assert drawn["axes"] == len(charts)
    for metric in CHARTED:
        assert drawn["points"][metric.title.lower()] == (4 if metric.event == "eval" else 12)


def test_a_comparison_draws_every_metric_of_every_run(page, instance, finished):
    page.goto(f"{instance.address}/runs/compare?run={finished[0]}&run={finished[1]}")
    expect(page.locator("[data-status]")).to_have_text("24 steps")
    choice = page.locator("[data-metric]")
    assert choice.locator("option").all_inner_texts() == [m.title.lower() for m in CHARTED]
    chart = page.locator("[data-chart]")
    for metric in CHARTED:
        choice.select_option(metric.name)
        page.wait_for_function(
            "title => document.querySelector('[data-chart]').layout.yaxis.title.text === title",
            arg=metric.title.lower(),
        )
        points = chart.evaluate(CHART.replace("annotations.map", "annotations?.map"))["points"]
        assert points == dict.fromkeys(("One", "Two"), 4 if metric.event == "eval" else 12)
    assert re.search(r"[?&]metric=eval_loss", page.url)
