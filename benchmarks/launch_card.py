"""Measure how long the launch summary takes to update after a slider moves, with manual settings
and with Auto. Token lengths and memory estimators are cached before.

Changing the rank leaves all batches unchanged. `batch` changes the tokens per batch, so all batches
are recomputed. It uses the built-in model and the smart home example in its own instance, and
Django's test client, so network and browser are not included.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import print_report, quantile
from benchmarks.engine_step import import_builtin_model

REPEATS = 40


def make_instance() -> tuple[Any, dict[str, Any]]:
    """A signed-in client and the fields of its launch form, with a ready model and tokenized
    data.
    """
    import django

    django.setup()
    from django.core.management import call_command
    from django.test import Client

    from training.catalog.metadata import read_model_metadata
    from training.catalog.models import BaseModel
    from training.datasets.examples import add_example
    from training.gpus import devices
    from training.people.models import User
    from training.runs.forecast.token_lengths import get_lengths

    call_command("migrate", verbosity=0)
    folder, user = import_builtin_model(), User.objects.create_superuser("bench")
    model = BaseModel.objects.create(
        name="built-in",
        source="folder",
        location=str(folder),
        state="ready",
        metadata=read_model_metadata(folder),
    )
    data = add_example(user, "smart_home")
    devices.update_devices()
    get_lengths(data, model)
    client = Client(HTTP_HOST="127.0.0.1", HTTP_HX_REQUEST="true")
    client.force_login(user)
    return client, {"model": model.pk, "data": data.pk, "method": "lora", "goal": "task"}


def main() -> None:
    with tempfile.TemporaryDirectory() as home:
        os.environ |= {
            "SNAPML_HOME": home,
            "DJANGO_SETTINGS_MODULE": "snapml_site.settings",
            "DATABASE_URL": "",
            "REDIS_URL": "",
        }
        client, default_form = make_instance()
        figures: dict[str, float] = {}
        for mode, prefix in (("manual", ""), ("auto", "set-")):
            form = default_form | {"mode": mode}
            client.post("/runs/new/memory", form)  # Builds the missing estimators
            for name, first, increment in (("rank", 4, 1), ("max_tokens_per_batch", 1024, 32)):
                milliseconds = []
                for turn in range(REPEATS):
                    began = time.monotonic()
                    response = client.post(
                        "/runs/new/summary",
                        form | {prefix + name: first + increment * turn, f"was-{name}": 0},
                    )
                    milliseconds.append(1000 * (time.monotonic() - began))
                    assert response.status_code == 200 and b"free:" in response.content, (
                        response.content[:2000]
                    )
                label = mode if name == "rank" else f"{mode}_batch"
                figures |= {
                    f"{label}_p50_ms": round(statistics.median(milliseconds), 1),
                    f"{label}_p95_ms": round(quantile(milliseconds, 0.95), 1),
                }
        print_report(figures)


if __name__ == "__main__":
    main()
