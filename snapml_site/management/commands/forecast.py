"""`manage.py forecast CONFIG.json`: the memory that each PEFT method needs for any model, without
its weights.
"""

import json
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from django.core.management.base import CommandError

from snapml_site.management.checked_command import CheckedCommand
from training.engine.methods import METHODS
from training.errors import UserError
from training.runs.forecast.any_model import forecast_any_model
from training.runs.forecast.memory import CONTEXT_BYTES
from training.runs.launch.yaml_reader import load_yaml
from training.text_input import InvalidInput, parse_json

MEMORY_KINDS = ("weights", "gradients", "optimizer", "activations", "logits", "temporary")
TABLE_HEADER = (
    "method",
    "trained",
    "precision",
    "states",
    *MEMORY_KINDS,
    "step",
    "load",
    "eval",
    "peak",
)


class Command(CheckedCommand):
    help = "Print the memory that training a model needs, computed from its config.json."

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("config", type=Path, help="a config.json, or its folder")
        parser.add_argument("--method", choices=[*METHODS, "all"], default="all")
        parser.add_argument("--rows", type=int, default=1)
        parser.add_argument("--length", type=int, default=2048, help="tokens per row")
        parser.add_argument("--device", choices=sorted(CONTEXT_BYTES), default="cuda")
        parser.add_argument(
            "--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of the run"
        )
        parser.add_argument("--json", action="store_true")

    def handle(self, *args: Any, **options: Any) -> None:
        path = options["config"]
        try:
            path = path / "config.json" if path.is_dir() else path
            model = parse_json(path.read_bytes(), path.name, allow_any_number=True)
        except (OSError, InvalidInput) as error:
            raise CommandError(f"{path} cannot be read: {error}") from error
        if not isinstance(model, dict):
            raise CommandError(f"{path} must be a JSON object.")
        settings = dict(pair.partition("=")[::2] for pair in options["set"])
        try:
            run_settings = {name: load_yaml(value) for name, value in settings.items()}
        except UserError as error:
            raise CommandError(f"--set: {error.message}") from error
        forecasts = {}
        for name in METHODS if options["method"] == "all" else (options["method"],):
            try:
                shape = {
                    "rows": options["rows"],
                    "length": options["length"],
                    "device": options["device"],
                }
                forecasts[name] = forecast_any_model(
                    model, {**run_settings, "method": name}, **shape
                )
            except UserError as error:
                if options["method"] != "all":
                    raise CommandError(error.message) from error
                self.stderr.write(f"{METHODS[name].title}: {error.message}")
        self.stdout.write(
            json.dumps(forecasts, indent=1) if options["json"] else format_table(forecasts)
        )


def format_table(forecasts: dict[str, dict[str, Any]]) -> str:
    """The forecasts as a Markdown table, in GB."""
    lines = ["| " + " | ".join(TABLE_HEADER) + " |", "|---" * len(TABLE_HEADER) + "|"]
    for name, forecast in forecasts.items():
        sizes = [forecast["kinds"][kind] for kind in MEMORY_KINDS] + [
            forecast[phase] for phase in ("step", "load", "eval", "peak")
        ]
        cells = [
            METHODS[name].title,
            f"{forecast['trainable'] / 1e6:,.1f} M",
            forecast["precision"],
            forecast["optimizer"],
        ]
        lines.append("| " + " | ".join([*cells, *(f"{size / 1e9:.1f}" for size in sizes)]) + " |")
    return "\n".join(lines)
