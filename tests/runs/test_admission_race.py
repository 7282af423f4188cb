"""Fifty concurrent launches at a team's limit: exactly as many runs get a device as it allows."""

import shutil
import threading

import pytest
from django.db import connections

from tests import tiny
from tests.launching import launch_run
from training.gpus.devices import DeviceReading, update_devices
from training.gpus.models import Allocation, Pool, Quota
from training.people.models import User
from training.runs.models import Run
from training.runs.queue import admission

THREADS, DEVICES, LIMIT = 50, 4, 3


@pytest.mark.django_db(transaction=True)
def test_concurrent_launches_admit_exactly_as_many_runs_as_the_limit_allows(
    alice, base_model, data, no_queue
):
    update_devices(
        [
            DeviceReading(number, f"GPU-{number}", "A100", "A100", 80 * 10**9, 0)
            for number in range(DEVICES)
        ]
    )
    Quota.objects.create(pool=Pool.objects.get(), team=data.dataset.team, limit=LIMIT)
    start_barrier, admitted, errors = threading.Barrier(THREADS), [], []

    def submit():
        try:
            user = User.objects.get(pk=alice.pk)
            start_barrier.wait()
            launch_run(user, base_model=base_model, data=data, settings=tiny.SETTINGS)
            admitted.extend(admission.admit_runs())
        except Exception as error:  # noqa: BLE001 asserted below in the main thread
            errors.append(error)
        finally:
            connections.close_all()

    threads = [threading.Thread(target=submit) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    try:
        assert not errors
        assert Run.objects.count() == THREADS
        allocations = list(
            Allocation.objects.filter(released_at=None).values_list("device", "run_id")
        )
        assert len(allocations) == len(admitted) == LIMIT
        assert len({device for device, _ in allocations}) == LIMIT
    finally:
        for run in Run.objects.all():
            shutil.rmtree(run.folder, ignore_errors=True)
