"""Fill an instance for test_pages.py with many objects with long names. Prints a run's id."""

from pathlib import Path

import django

LONG = "An adapter with quite a long name that says what it is for"
RUN = "A run with quite a long name that says everything about its settings and more, number {}"
RUNS, LAUNCHED = 200, 26  # the others are copies of the first


def make_runs(alice):
    from django.db import transaction

    from tests.launching import launch_run
    from training.catalog.models import BaseModel
    from training.datasets.models import DatasetVersion
    from training.runs.models import Run
    from training.runs.worker import tasks

    tasks.supervise_task = lambda _id: None
    model, data = BaseModel.objects.get(), DatasetVersion.objects.get()
    ended = {
        "state": "failed",
        "message": "It was too much. " * 20,
        "sparkline": [3, 2, 1.5],
        "step": 7,
        "total_steps": 9,
    }
    for number in range(LAUNCHED):
        with transaction.atomic():  # the worker never sees it waiting
            name = RUN.format(number)
            run = launch_run(alice, base_model=model, data=data, settings={}, name=name)
            Run.objects.filter(pk=run.pk).update(**ended)
    first = Run.objects.order_by("pk").first()
    fields = {field.attname: getattr(first, field.attname) for field in Run._meta.concrete_fields}
    Run.objects.bulk_create(
        Run(**{**fields, "id": None, "name": RUN.format(number)})
        for number in range(LAUNCHED, RUNS)
    )


def make_sweeps(alice):
    from adapters.evaluation.benchmark import BENCHMARK_METHODS
    from training.runs.models import Run, Sweep

    grid = {"rank": [1, 2], "learning_rate": [0.1, 0.2]}
    sweep = Sweep.objects.create(
        owner=alice, team=None, name="A sweep with a long name " * 4, grid=grid
    )
    Run.objects.filter(pk__lte=12).update(sweep=sweep, tags=",one,two,", best_eval_loss=1.5)
    benchmark = Sweep.objects.create(
        owner=alice,
        team=None,
        name="All methods on a long name " * 3,
        grid={"method": list(BENCHMARK_METHODS)},
    )
    for number, method in enumerate(BENCHMARK_METHODS):
        Run.objects.filter(pk=20 + number).update(sweep=benchmark, method=method)


def make_upload(alice):
    from django.conf import settings

    from training.datasets.uploads import receive_files

    path = Path(settings.HOME) / "fragen.csv"
    rows = "".join(f"{i},{'Long words ' * 30},yes\n" for i in range(30))
    path.write_text("id,Frage,Antwort\n" + rows)
    name = "A name of an upload that is quite long, too " * 2
    receive_files(alice, [(path, "fragen.csv", "")], name=name, source="upload: fragen.csv")


def make_versions(alice):
    from adapters.models import PromptSet, Reply
    from adapters.serving import services
    from tests.registry import register_version
    from training.runs.models import Run

    run = Run.objects.get(pk=1)
    versions = [
        register_version(run, name=LONG, number=number, eval_loss=1.5, tags=",candidate,")
        for number in range(1, 111)
    ]
    routing = services.Routing(versions[0], versions[1], 20, use_merged=False)
    services.create_deployment(alice, "lamps", routing)
    messages = [{"role": "user", "content": "Long words " * 30}]
    prompts = PromptSet.objects.create(
        owner=alice,
        name="Sixty prompts with a long name " * 3,
        rows=[{"messages": messages, "expected": "yes, it is"} for _ in range(60)],
    )
    scores = {"exact": 0.0, "normalized": 0.0, "rouge_l": 0.5, "chrf": 0.5, "perplexity": 2.0}
    Reply.objects.bulk_create(
        Reply(
            prompts=prompts,
            row=row,
            version=version,
            base_model=run.base_model,
            text=f"{version} says a long thing " * 20,
            scores=scores,
        )
        for row in range(60)
        for version in (versions[0], versions[1], None)
    )


def main():
    django.setup()
    from training.people.models import User
    from training.runs.models import Run

    alice = User.objects.get()
    for make_objects in (make_runs, make_sweeps, make_upload, make_versions):
        make_objects(alice)
    print(Run.objects.filter(pk__lte=LAUNCHED).latest("pk").pk)


if __name__ == "__main__":
    main()
