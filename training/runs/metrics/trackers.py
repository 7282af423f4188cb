"""Export the metrics of a run to other trackers with their own libraries, which are imported only
when needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

from training.errors import UserError
from training.runs.metrics.comparison import flatten_dict
from training.runs.metrics.table import iter_steps
from training.runs.models import Run

BATCH = 1000
TIMES = ("step", "time")


class MissingExtra(UserError):
    """The library of the tracker is not installed."""


def iter_metrics(run: Run) -> Iterator[tuple[int, float, dict[str, float]]]:
    """(step, seconds since the epoch, finite metrics) of every step."""
    started_at = run.started_at.timestamp() if run.started_at else 0.0
    for row in iter_steps(run):
        known = {
            name: float(value)
            for name, value in row.items()
            if name not in TIMES and value is not None
        }
        yield (
            int(row["step"]),
            float(row["time"] or started_at),
            {name: value for name, value in known.items() if math.isfinite(value)},
        )


def build_missing_extra(extra: str, error: ImportError) -> MissingExtra:
    return MissingExtra(
        f"{extra} is not installed ({error.name}). Install it with: pip install 'snapml[{extra}]'",
        field="to",
    )


def to_tensorboard(run: Run, target: str) -> str:
    """Write an event file to the folder `target`, with one scalar per metric and step; returns the
    folder.
    """
    try:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter
    except ImportError as error:
        raise build_missing_extra("tensorboard", error) from error
    writer = EventFileWriter(target)
    for step, time, metrics in iter_metrics(run):
        values = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        writer.add_event(Event(step=step, wall_time=time, summary=Summary(value=values)))
    writer.close()
    return target


def to_mlflow(run: Run, target: str) -> str:
    """Create a run in the experiment `SnapML` of the tracking server `target`; returns its id
    there.
    """
    try:
        from mlflow.entities import Metric, Param
        from mlflow.tracking import MlflowClient
    except ImportError as error:
        raise build_missing_extra("mlflow", error) from error
    client = MlflowClient(tracking_uri=target)
    existing = client.get_experiment_by_name("SnapML")
    experiment = existing.experiment_id if existing else client.create_experiment("SnapML")
    started = int(run.started_at.timestamp() * 1000) if run.started_at else None
    tracked_run = client.create_run(experiment, start_time=started, run_name=run.name)
    params = {"model": run.base_model.name, "data": str(run.data), **run.config}
    client.log_batch(
        tracked_run.info.run_id,
        params=[Param(name, str(value)[:500]) for name, value in flatten_dict(params).items()],
    )
    batch: list[Any] = []
    for step, time, metrics in iter_metrics(run):
        batch += [Metric(name, value, int(time * 1000), step) for name, value in metrics.items()]
        if len(batch) > BATCH - 20:
            client.log_batch(tracked_run.info.run_id, metrics=batch)
            batch = []
    client.log_batch(tracked_run.info.run_id, metrics=batch)
    client.set_terminated(
        tracked_run.info.run_id, status="FINISHED" if run.state == "finished" else "FAILED"
    )
    return str(tracked_run.info.run_id)


def to_wandb(run: Run, target: str) -> str:
    """Create a run in the project `target`; returns its folder. With WANDB_MODE=offline it is
    written to ./wandb and can be synced later.
    """
    try:
        import wandb
    except ImportError as error:
        raise build_missing_extra("wandb", error) from error
    params = {"model": run.base_model.name, "data": str(run.data), **run.config}
    tracked_run = wandb.init(
        project=target,
        name=run.name,
        config=params,
        tags=run.tag_list,
        notes=run.notes or None,
        reinit="finish_previous",
    )
    for step, _time, metrics in iter_metrics(run):
        tracked_run.log(metrics, step=step)
    tracked_run.finish()
    return str(tracked_run.dir)


EXPORTS: dict[str, Callable[[Run, str], str]] = {
    "tensorboard": to_tensorboard,
    "mlflow": to_mlflow,
    "wandb": to_wandb,
}
