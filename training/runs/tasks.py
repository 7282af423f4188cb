"""Huey's doors: thin, and handed nothing but an id."""

from __future__ import annotations

from huey.contrib.djhuey import db_task


@db_task()
def supervise(run_id: int) -> None:
    from training.runs.supervise import supervise_run

    supervise_run(run_id)


@db_task()
def import_model(model_id: int) -> None:
    from training.catalog.acts import import_model as act

    act(model_id)
