"""Measure how the time of a LoRA step grows with length, batch and rank, and forecast its memory.

It uses SmolLM2-135M with its real weights and rows of random tokens, half of them trained.
`--picture FILE.png` draws the curves (needs Chromium).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

WARMUP_STEPS, TIMED_STEPS = 1, 3
DEFAULTS = {"length": 128, "rows": 8, "rank": 16}
SWEEPS: dict[str, tuple[int, ...]] = {
    "length": (32, 64, 128, 256, 512),
    "rows": (1, 2, 4, 8, 16, 32),
    "rank": (4, 16, 64, 128, 256),
}
TITLES = {
    "length": "tokens per row (8 rows, rank 16)",
    "rows": "rows per step (128 tokens, rank 16)",
    "rank": "rank (8 rows of 128 tokens)",
}


def measure_step_seconds(base: Any, length: int, rows: int, rank: int) -> float:
    """Median of TIMED_STEPS steps with forward, backward and AdamW."""
    import torch

    from training.engine.config import RunConfig
    from training.engine.modeling.model import LabeledPositionsHead
    from training.engine.modeling.optimizers import make_optimizer
    from training.engine.train.session import wrap_for_training

    device = torch.device("cpu")
    config = RunConfig.from_dict({"rank": rank, "alpha": 2 * rank})
    model = wrap_for_training(base, config, device).train()
    head, optimizer = LabeledPositionsHead(model), make_optimizer(model, config, device)
    ids = torch.randint(0, 40_000, (rows, length), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, : length // 2] = -100
    durations = []
    for _ in range(WARMUP_STEPS + TIMED_STEPS):
        began = time.monotonic()
        loss = head.compute_loss_sum(model, ids, labels) / labels.numel()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        durations.append(time.monotonic() - began)
    head.remove_hook()
    model.unload()
    return statistics.median(durations[WARMUP_STEPS:])


def draw_figure(results: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Draw seconds and memory over length, rows and rank as a PNG."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    from tests.browser.chromium import launch_browser

    figure = make_subplots(rows=2, cols=3, shared_xaxes="columns", vertical_spacing=0.06)
    for column, (name, points) in enumerate(results.items(), 1):
        x = [point[name] for point in points]
        for row, (key, scale, color) in enumerate(
            (("seconds", 1.0, "#0072B2"), ("bytes", 1e9, "#D55E00")), 1
        ):
            line = {"color": color, "width": 2}
            y = [point[key] / scale for point in points]
            figure.add_trace(
                go.Scatter(x=x, y=y, mode="lines+markers", line=line, showlegend=False),
                row=row,
                col=column,
            )
            figure.update_yaxes(rangemode="tozero", gridcolor="#e3e6ea", row=row, col=column)
        figure.update_xaxes(title_text=TITLES[name], row=2, col=column)
        figure.update_xaxes(gridcolor="#e3e6ea", col=column)
    figure.update_yaxes(title_text="seconds per step", row=1, col=1)
    figure.update_yaxes(title_text="memory, GB", row=2, col=1)
    figure.update_layout(
        width=1200, height=560, plot_bgcolor="white", font={"family": "sans-serif", "size": 13}
    )
    figure.update_layout(margin={"l": 60, "r": 20, "t": 20, "b": 50})
    with launch_browser() as chromium:
        page = chromium.new_page(viewport={"width": 1200, "height": 560})
        page.set_content(figure.to_html(include_plotlyjs=True, config={"displayModeBar": False}))
        page.wait_for_selector(".main-svg")
        page.screenshot(path=path)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    import torch

    from benchmarks import estimator_device, print_report
    from benchmarks.engine_step import import_builtin_model
    from training.engine.config import RunConfig
    from training.engine.memory_estimator import BatchShape, find_peak_memory
    from training.engine.modeling.model import get_fastest_dtype, load_base
    from training.engine.simulation.forecast import build_estimator

    folder = arguments.model or import_builtin_model()
    estimator = build_estimator(folder, RunConfig(), estimator_device(torch.device("cpu")))
    threads = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))
    torch.set_num_threads(threads)
    base = load_base(folder, get_fastest_dtype(torch.device("cpu")), torch.device("cpu"))
    results: dict[str, list[dict[str, float]]] = {}
    for name, values in SWEEPS.items():
        results[name] = []
        for value in values:
            point = {**DEFAULTS, name: value}
            config = RunConfig.from_dict({"rank": point["rank"], "alpha": 2 * point["rank"]})
            peak_bytes = find_peak_memory(
                estimator,
                [BatchShape(point["rows"], point["length"], point["rows"] * point["length"] // 2)],
                config,
            ).total
            results[name].append(
                {
                    name: value,
                    "seconds": round(measure_step_seconds(base, **point), 3),
                    "bytes": int(peak_bytes),
                }
            )
    if arguments.picture:
        draw_figure(results, arguments.picture)
    print_report(
        {
            "model": folder.name,
            "threads": threads,
            **{f"by_{name}": json.dumps(points) for name, points in results.items()},
        }
    )


if __name__ == "__main__":
    main()
