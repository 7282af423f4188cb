"""What several tests of runs need."""

import shutil

import pytest

from tests import tiny


@pytest.fixture
def launched(transactional_db, alice, base_model, data, device, no_bell):
    from training.runs.launch.services import launch_run

    made = []

    def launch(**settings):
        run = launch_run(
            alice,
            base_model=base_model,
            data=data,
            settings={**tiny.SETTINGS, **settings},
            name="Lamps",
        )
        made.append(run)
        return run

    yield launch
    for run in made:
        shutil.rmtree(run.folder, ignore_errors=True)
