"""How long the launch card takes to answer a moved slider, by hand and with Auto, once tokens are counted and laws are made.

Asks an instance that is there (SNAPML_HOME): its first model that is ready and its newest data. Django's test client, so neither
network nor browser is in it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ.setdefault("DJANGO_SETTINGS_MODULE", "snapml_site.settings")

TIMES = 40


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", action="store_true")
    parser.parse_args()
    import django

    django.setup()
    from django.test import Client

    from benchmarks import quantile, report
    from training.catalog.models import BaseModel
    from training.datasets.models import DatasetVersion
    from training.people.models import User
    from training.runs.measure import lengths

    model, data = BaseModel.objects.filter(state="ready").first(), DatasetVersion.objects.order_by("-pk").first()
    if model is None or data is None:
        sys.exit("This instance has no model that is ready, or no data; start it with `make run` and add an example.")
    lengths(data, model)
    client = Client(HTTP_HOST="127.0.0.1")
    client.force_login(User.objects.filter(is_superuser=True).order_by("pk")[0])
    figures: dict[str, float] = {"rows": data.train_rows}
    for mode in ("choose", "auto"):
        form = {"mode": mode, "model": model.pk, "data": data.pk, "method": "lora", "goal": "task"}
        client.post("/runs/new/memory", form)
        taken = []
        for turn in range(TIMES):
            moved = {"rank": 4 + turn} if mode == "choose" else {"set-rank": 4 + turn, "was-rank": 0}
            began = time.monotonic()
            answer = client.post("/runs/new/card", form | moved)
            taken.append(1000 * (time.monotonic() - began))
            assert answer.status_code == 200 and b"free: " in answer.content, answer.content[:2000]
        figures |= {f"{mode}_p50_ms": round(statistics.median(taken), 1), f"{mode}_p95_ms": round(quantile(taken, 0.95), 1)}
    report(figures)


if __name__ == "__main__":
    main()
