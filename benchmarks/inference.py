"""Measure the cost of adapters in the inference engine: merged against base, attached against base,
eight adapters in one batch against eight single requests, and switching between adapters.

All variants run alternately in one process, on the built-in model with LoRA of rank 16 on all
linear layers. The figures are medians over the rounds, in tokens per second of greedy decoding,
with prompts of the example data and TOKENS new tokens each.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from adapters.inference.batch import ActiveSequence, Batch
from adapters.inference.loaded_model import LoadedModel
from adapters.inference.types import AdapterRef, BaseRef, GenerationRequest
from benchmarks import print_report
from benchmarks.engine_step import EXAMPLE, import_builtin_model
from training.engine.config import RunConfig
from training.engine.data.conversations import encode_prompt, load_tokenizer, read_rows
from training.engine.methods import METHODS
from training.engine.modeling.merge import merge_adapter
from training.engine.modeling.model import load_base
from training.engine.modeling.weights import write_weights

ROUNDS, TOKENS, ADAPTERS = 3, 24, 8
CPU = torch.device("cpu")


def main() -> None:
    folder = import_builtin_model()
    adapters = make_adapters(folder, ADAPTERS)
    merged_folder = folder.with_name(f"{folder.name}-merged")
    merge_adapter(folder, adapters[0].folder, "lora").save_pretrained(
        merged_folder, max_shard_size="1000GB"
    )
    load_tokenizer(folder).save_pretrained(merged_folder)
    base, fused = LoadedModel(BaseRef(folder)), LoadedModel(BaseRef(merged_folder, sha256="merged"))
    attached = LoadedModel(BaseRef(folder))
    for adapter in adapters:
        attached.ensure_adapter(adapter, set())
    prompts = load_prompts(base, ADAPTERS)
    speeds: dict[str, list[float]] = {}
    for _ in range(ROUNDS):
        one = [(prompts[0], None)]
        speeds.setdefault("base", []).append(measure_speed(base, one))
        speeds.setdefault("merged", []).append(measure_speed(fused, one))
        speeds.setdefault("attached", []).append(
            measure_speed(attached, [(prompts[0], adapters[0])])
        )
        for count in (1, 2, 4, 8):
            rows = [(prompt, adapters[index % count]) for index, prompt in enumerate(prompts)]
            speeds.setdefault(f"mixed of {count}", []).append(measure_speed(attached, rows))
        single_speeds = [
            measure_speed(attached, [(prompt, adapter)])
            for prompt, adapter in zip(prompts, adapters, strict=True)
        ]
        speeds.setdefault("eight runs of one", []).append(statistics.harmonic_mean(single_speeds))
        speeds.setdefault("batch of 8 base rows", []).append(
            measure_speed(base, [(prompt, None) for prompt in prompts])
        )
    median = {name: statistics.median(values) for name, values in speeds.items()}
    print_report(
        {
            **{f"{name}, tokens/s": value for name, value in median.items()},
            "merged_over_base": speed_ratio(speeds, "merged", "base"),
            "attached_over_base": speed_ratio(speeds, "attached", "base"),
            "mixed_over_single": speed_ratio(speeds, f"mixed of {ADAPTERS}", "eight runs of one"),
            "switch_ms": statistics.median(measure_switches(attached, adapters)),
            "load_ms": statistics.median(measure_loads(folder, adapters)),
            "threads": torch.get_num_threads(),
        }
    )


def speed_ratio(speeds: dict[str, list[float]], above: str, below: str) -> float:
    """Median ratio of measurements of the same round, so that a slow moment affects both."""
    return statistics.median(
        one / other for one, other in zip(speeds[above], speeds[below], strict=True)
    )


def measure_speed(
    loaded_model: LoadedModel, rows: Sequence[tuple[list[int], AdapterRef | None]]
) -> float:
    """Decoded tokens per second of all rows together, without prefill."""
    batch = Batch()
    with torch.inference_mode():
        for ids, adapter in rows:
            loaded_model.ensure_adapter(adapter, set())
            prefill = loaded_model.run_prefill(torch.tensor([ids]), adapter)
            request = GenerationRequest(base=loaded_model.base, adapter=adapter)
            token = int(prefill.logits[0, -1].argmax())
            batch.add_sequence(
                ActiveSequence(request, len(ids), TOKENS, torch.Generator(), token=token),
                prefill.cache,
            )
        began = time.perf_counter()
        for _ in range(TOKENS):
            logits = batch.decode_step(loaded_model)
            for sequence, row in zip(batch.sequences, logits, strict=True):
                sequence.token = int(row.argmax())
        return len(rows) * TOKENS / (time.perf_counter() - began)


def measure_switches(loaded_model: LoadedModel, adapters: list[AdapterRef]) -> list[float]:
    """Extra milliseconds of a forward pass with another adapter, compared with the same adapter
    again.
    """
    ids = torch.tensor([[1]])
    with torch.inference_mode():
        for adapter in adapters:
            loaded_model.run_prefill(ids, adapter)
        forwards = [partial(loaded_model.run_prefill, ids, adapter) for adapter in adapters]
        return [measure_ms(run) - measure_ms(run) for _ in range(ROUNDS) for run in forwards]


def measure_loads(folder: Path, adapters: list[AdapterRef]) -> list[float]:
    """Milliseconds to load another adapter from disk."""
    loaded_model = LoadedModel(BaseRef(folder))
    loaded_model.ensure_adapter(adapters[0], set())
    return [
        measure_ms(partial(loaded_model.ensure_adapter, adapter, set())) for adapter in adapters[1:]
    ]


def measure_ms(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return 1000 * (time.perf_counter() - began)


def load_prompts(loaded_model: LoadedModel, count: int) -> list[list[int]]:
    rows = [row for row in read_rows(EXAMPLE) if row["split"] == "train"][:count]
    return [
        encode_prompt(loaded_model.tokenizer, {"messages": row["messages"][:-1]}) for row in rows
    ]


def make_adapters(folder: Path, count: int) -> list[AdapterRef]:
    """LoRA adapters with random updates. Their quality does not matter for speed."""
    model = METHODS["lora"].wrap_model(
        load_base(folder, torch.float32, CPU), RunConfig(model=str(folder), rank=16, alpha=32)
    )
    adapters = []
    for number in range(count):
        torch.manual_seed(number)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=1e-3)
        target = Path(tempfile.mkdtemp(prefix="snapml-bench-adapter-"))
        write_weights(model, target)
        adapters.append(AdapterRef(target, f"bench-{number}"))
    return adapters


if __name__ == "__main__":
    main()
