"""The method benchmark: one run per method under one budget, and a report of what was measured."""

import csv
import io
import json

import pytest
from django.core.management import call_command
from django.urls import reverse

from adapters.evaluation import benchmark
from adapters.evaluation.benchmark import BENCHMARK_METHODS, Budget
from adapters.models import PromptSet, Reply
from adapters.registry import services
from tests.user_errors import raises_user_error
from training.engine.outcome import read_result
from training.errors import Conflict, UserError
from training.jobs.models import Job
from training.runs.launch import request
from training.runs.launch.yaml_file import to_yaml
from training.runs.models import Run, Sweep

pytestmark = [pytest.mark.django_db, pytest.mark.once]
SMALL = Budget(max_steps=6, max_tokens_per_batch=160, max_length=80)


@pytest.fixture
def benchmark_sweep(alice, base_model, data, device, no_queue):
    return benchmark.launch_benchmark(alice, base_model, data, SMALL)


def finish_run(run, engine):
    """Train the run and store what the report reads."""
    assert engine([str(run.folder)]) == 0
    start = next(
        json.loads(line) for line in (run.folder / "events.jsonl").open() if '"start"' in line
    )
    result = read_result(run.folder)
    run.start_info, run.best_eval_loss, run.peak_memory_bytes, run.state = (
        start,
        result.eval_loss,
        10**8 + run.pk,
        "finished",
    )
    run.save()
    services.register_run_result(run, result)


def test_every_method_gets_the_same_budget_and_its_own_default_settings(benchmark_sweep):
    runs = {run.method: run for run in benchmark_sweep.runs.all()}
    assert set(runs) == set(BENCHMARK_METHODS)
    assert {run.config["max_steps"] for run in runs.values()} == {6}
    assert {run.config["max_tokens_per_batch"] for run in runs.values()} == {160}
    assert runs["prefix"].config["learning_rate"] != runs["lora"].config["learning_rate"]
    assert benchmark.is_benchmark(benchmark_sweep)
    assert not benchmark.is_benchmark(Sweep(grid={"rank": [1, 2]}))


def test_a_method_that_can_never_start_is_skipped_and_the_report_says_why(
    as_alice, alice, base_model, data, device, no_queue, monkeypatch
):
    fits = request.check_schedulable

    def check_schedulable(resolved, config, *more):
        if config.method == "full":
            raise UserError("This run can never start in CPU: it needs 112.0 GB.")
        fits(resolved, config, *more)

    monkeypatch.setattr(request, "check_schedulable", check_schedulable)
    sweep = benchmark.launch_benchmark(
        alice, base_model, data, Budget(max_steps=6, max_tokens_per_batch=160, max_length=80)
    )
    assert {run.method for run in sweep.runs.all()} == set(BENCHMARK_METHODS) - {"full"}
    page = as_alice.get(reverse("benchmark", args=[sweep.pk])).content.decode()
    assert "Not started: This run can never start in CPU: it needs 112.0 GB." in page
    rows = benchmark.build_report(sweep)
    assert "Full fine-tuning,not started: This run" in benchmark.format_csv(sweep, rows)
    assert "Full fine-tuning was not started: This run" in benchmark.format_markdown(sweep, rows)


def test_a_run_file_relaunches_one_run_or_the_whole_benchmark(benchmark_sweep, tmp_path):
    run = benchmark_sweep.runs.get(method="prefix")
    file = tmp_path / "run.yaml"
    file.write_text(to_yaml(run))
    options = {"user": "alice", "accept_warnings": True, "stdout": io.StringIO()}
    call_command("launch", str(file), **options)
    alone = Run.objects.latest("pk")
    assert (alone.config, alone.sweep) == (run.config, None)
    call_command("launch", str(file), "--again", **options)
    again = Sweep.objects.exclude(pk=benchmark_sweep.pk).get()
    assert benchmark.is_benchmark(again)
    assert again.name == benchmark_sweep.name
    configs = {
        method: benchmark_sweep.runs.get(method=method).config for method in BENCHMARK_METHODS
    }
    assert {run.method: run.config for run in again.runs.all()} == configs


def test_either_all_runs_start_or_none(alice, base_model, data, device, no_queue):
    with pytest.raises(UserError):
        benchmark.launch_benchmark(
            alice, base_model, data, Budget(max_steps=6, max_tokens_per_batch=8, max_length=80)
        )
    with raises_user_error(field="max_steps", naming=("100,000",)):
        benchmark.launch_benchmark(alice, base_model, data, Budget(max_steps=0))
    assert not Run.objects.exists()
    assert not Sweep.objects.exists()


def test_the_report_has_the_measured_figures(alice, benchmark_sweep, engine_here):
    for run in benchmark_sweep.runs.all():
        finish_run(run, engine_here)
    rows = {row.run.method: row for row in benchmark.build_report(benchmark_sweep)}
    assert list(rows) == list(BENCHMARK_METHODS)
    assert rows["full"].trainable_share == 1.0
    assert 0 < rows["prompt"].trainable_share < rows["lora"].trainable_share < 1
    assert rows["full"].memory_saved == 0.0
    assert rows["full"].loss_over_full == 1.0
    assert rows["lora"].size_bytes < rows["full"].size_bytes
    assert rows["lora"].speed_over_base is None  # no replies yet
    prompts = benchmark.request_all_replies(alice, benchmark_sweep)
    assert Job.objects.count() == 7
    base = benchmark_sweep.runs.first().base_model
    for version, rate in ((None, 10.0), (rows["lora"].version, 8.0)):
        Reply.objects.create(
            prompts=prompts,
            row=0,
            version=version,
            base_model=base,
            text="x",
            tokens=10,
            seconds=10 / rate,
            scores={"exact": 1.0},
        )
    lora = next(row for row in benchmark.build_report(benchmark_sweep) if row.run.method == "lora")
    assert (lora.speed_over_base, lora.exact_match) == (pytest.approx(0.8), 1.0)
    table = list(
        csv.reader(
            io.StringIO(
                benchmark.format_csv(benchmark_sweep, benchmark.build_report(benchmark_sweep))
            )
        )
    )
    assert [row[0] for row in table[1:]] == [row.title for row in rows.values()]
    assert "| LoRA |" in benchmark.format_markdown(
        benchmark_sweep, benchmark.build_report(benchmark_sweep)
    )


def test_unfinished_runs_show_dashes_and_replies_cannot_be_requested(
    as_alice, alice, benchmark_sweep
):
    page = as_alice.get(f"/benchmarks/{benchmark_sweep.pk}").content.decode()
    assert page.count("\N{EN DASH}") > 30
    with raises_user_error(Conflict, code="unfinished_runs"):
        benchmark.request_all_replies(alice, benchmark_sweep)
    assert not PromptSet.objects.exists()
    assert (
        "Memory saved" in as_alice.get(f"/benchmarks/{benchmark_sweep.pk}/export").content.decode()
    )


def test_another_sweep_is_not_a_benchmark(as_alice, alice, run):
    other = Sweep.objects.create(owner=alice, name="Grid", grid={"rank": [1, 2]})
    assert as_alice.get(f"/benchmarks/{other.pk}").status_code == 404


def test_the_form_starts_a_benchmark_and_keeps_the_input_after_an_error(
    as_alice, base_model, data, device, no_queue
):
    form = {
        "model": base_model.pk,
        "data": data.pk,
        "max_steps": 6,
        "max_tokens_per_batch": 160,
        "max_length": 80,
        "name": "Six",
    }
    invalid = as_alice.post("/benchmarks/new", {**form, "max_tokens_per_batch": 20})
    assert invalid.status_code == 400
    assert 'value="20"' in invalid.content.decode()
    assert as_alice.post("/benchmarks/new", {**form, "data": 999}).status_code == 404
    response = as_alice.post("/benchmarks/new", form)
    assert response["Location"] == f"/benchmarks/{Sweep.objects.get().pk}"
