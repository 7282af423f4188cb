"""The engine on a run folder: inputs, outputs, resuming, and every outcome."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests import tiny
from tests.engine import families
from tests.user_errors import assert_mentions
from training.engine.config import RunConfig
from training.engine.data.conversations import EncodedRow
from training.engine.modeling.model import LabeledPositionsHead
from training.engine.outcome import EXIT_CODES, Outcome, read_result
from training.engine.train.checkpoint import find_latest_valid, is_valid, list_checkpoints
from training.engine.train.loop import take_step

ROOT = Path(__file__).parents[2]


def start_engine(folder, **kwargs):
    return subprocess.Popen(
        [sys.executable, "-m", "training.engine", str(folder)],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        **kwargs,
    )


def run_engine(folder):
    process = start_engine(folder)
    _, errors = process.communicate(timeout=120)
    return process.returncode, errors.decode()


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory, tiny_model):
    folder = tiny.make_run(tmp_path_factory.mktemp("runs") / "run", tiny_model, max_steps=12)
    code, errors = run_engine(folder)
    assert code == 0, errors
    return folder


def test_the_engine_runs_from_a_shell_without_the_site(finished_run):
    result = read_result(finished_run)
    assert result.outcome is Outcome.FINISHED
    assert result.step == result.total_steps == 12
    assert result.eval_loss is not None


def test_the_journal_has_all_events_in_order(finished_run):
    events = tiny.read_events(finished_run)
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    assert [event["step"] for event in events if event["kind"] == "step"] == list(range(1, 13))
    assert [event["step"] for event in events if event["kind"] == "eval"] == [0, 4, 8, 12]
    assert [event["step"] for event in events if event["kind"] == "sample"] == [0, 4, 8, 12]
    assert events[-1]["kind"] == "end"
    moments = [event["moment"] for event in events if event["kind"] == "memory"]
    assert moments[:3] == ["load", "eval", "first step"]
    assert {"eval", "save"} <= set(moments[3:])
    step = next(event for event in events if event["kind"] == "step")
    assert step["memory_peak_bytes"] >= step["memory_bytes"] > 0
    assert step["tokens"] >= step["trained_tokens"] > 0


def test_the_phase_is_training_once_the_first_step_is_done(finished_run):
    events = tiny.read_events(finished_run)
    first = next(index for index, event in enumerate(events) if event["kind"] == "step")
    phases = [event["name"] for event in events[first:] if event["kind"] == "phase"]
    assert phases[:2] == ["training", "evaluating"]


def test_the_loss_falls(finished_run):
    losses = [event["loss"] for event in tiny.read_events(finished_run) if event["kind"] == "step"]
    assert losses[-1] < losses[0] - 0.1  # a random base can only learn so much


def test_two_checkpoints_and_the_best_one_remain_and_are_valid(finished_run):
    checkpoints = list(list_checkpoints(finished_run))
    assert 2 <= len(checkpoints) <= 3
    assert all(is_valid(folder) for folder in checkpoints)
    assert not list((finished_run / "checkpoints").glob(".tmp-*"))


def test_plain_peft_loads_the_adapter_with_the_same_logits(finished_run, tiny_model):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    plain = base(torch.tensor([[2, 3, 4]])).logits
    model = PeftModel.from_pretrained(base, finished_run / "adapter").eval()
    adapted = model(torch.tensor([[2, 3, 4]])).logits
    assert not torch.allclose(plain, adapted)
    reloaded = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32),
        finished_run / "adapter",
    ).eval()
    assert torch.equal(adapted, reloaded(torch.tensor([[2, 3, 4]])).logits)


def test_the_same_run_gives_bit_identical_losses_and_adapter(
    finished_run, tmp_path, tiny_model, engine_here
):
    again = tiny.make_run(tmp_path / "again", tiny_model, max_steps=12)
    assert engine_here([str(again)]) == 0
    assert tiny.get_step_losses(tiny.read_events(again)) == tiny.get_step_losses(
        tiny.read_events(finished_run)
    )
    weights = "adapter/adapter_model.safetensors"
    assert (again / weights).read_bytes() == (finished_run / weights).read_bytes()


def test_a_killed_and_resumed_run_ends_with_the_same_bits(
    finished_run, tmp_path, tiny_model, engine_here
):
    folder = tiny.make_run(tmp_path / "killed", tiny_model, max_steps=12)
    process = start_engine(folder)
    wait_for(lambda: find_latest_valid(folder) is not None)
    process.kill()
    process.communicate()
    assert engine_here([str(folder)]) == 0
    events = tiny.read_events(folder)
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    assert any(event["kind"] == "resume" for event in events) or events[-1]["step"] == 12
    assert tiny.get_step_losses(events) == tiny.get_step_losses(tiny.read_events(finished_run))
    weights = "adapter/adapter_model.safetensors"
    assert (folder / weights).read_bytes() == (finished_run / weights).read_bytes()


def test_dropout_continues_its_random_sequence_after_a_kill(tmp_path, tiny_model, engine_here):
    settings = {"max_steps": 12, "dropout": 0.3}
    undisturbed = tiny.make_run(tmp_path / "a", tiny_model, **settings)
    assert engine_here([str(undisturbed)]) == 0
    disturbed = tiny.make_run(tmp_path / "b", tiny_model, **settings)
    process = start_engine(disturbed)
    wait_for(lambda: find_latest_valid(disturbed) is not None)
    process.kill()
    process.communicate()
    assert engine_here([str(disturbed)]) == 0
    assert tiny.get_step_losses(tiny.read_events(disturbed)) == tiny.get_step_losses(
        tiny.read_events(undisturbed)
    )


def test_sigterm_saves_a_checkpoint_and_the_next_start_resumes_from_it(tmp_path, tiny_model):
    folder = tiny.make_run(
        tmp_path / "run",
        tiny_model,
        max_steps=100_000,
        save_steps=100_000,
        eval_steps=100_000,
    )
    process = start_engine(folder)
    wait_for(lambda: '"kind": "step"' in read_journal(folder))
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == EXIT_CODES[Outcome.PREEMPTED]
    assert read_result(folder) is None
    saved_step = json.loads((find_latest_valid(folder) / "state.json").read_text())["step"]
    second_engine = start_engine(folder)
    wait_for(lambda: '"kind": "resume"' in read_journal(folder))
    second_engine.kill()
    second_engine.communicate()
    resumed = next(event for event in tiny.read_events(folder) if event["kind"] == "resume")
    assert resumed["step"] == saved_step > 0


@pytest.mark.parametrize(
    ("stop_word", "outcome", "has_adapter"),
    [("save", Outcome.STOPPED, True), ("discard", Outcome.DISCARDED, False)],
)
def test_a_stop_file_ends_the_run_with_or_without_an_adapter(
    tmp_path, tiny_model, engine_here, stop_word, outcome, has_adapter
):
    folder = tiny.make_run(tmp_path / stop_word, tiny_model, max_steps=3000)

    def request_stop():
        try:
            wait_for(lambda: '"kind": "step"' in read_journal(folder))
        finally:
            (folder / "stop").write_text(stop_word)

    with ThreadPoolExecutor() as pool:
        stopping = pool.submit(request_stop)
        engine_here([str(folder)])
        stopping.result()
    assert read_result(folder).outcome is outcome
    assert (folder / "adapter" / "adapter_model.safetensors").exists() is has_adapter


def test_an_expired_heartbeat_ends_the_run_with_a_checkpoint(tmp_path, tiny_model, engine_here):
    folder = tiny.make_run(tmp_path / "run", tiny_model, max_steps=3000)
    (folder / "heartbeat").touch()
    os.utime(folder / "heartbeat", (time.time() - 60, time.time() - 60))
    assert engine_here([str(folder)]) == EXIT_CODES[Outcome.PREEMPTED]


def test_a_second_engine_in_the_same_folder_exits(tmp_path, tiny_model, engine_here):
    folder = tiny.make_run(tmp_path / "run", tiny_model, max_steps=3000)
    first = start_engine(folder)
    wait_for(lambda: '"kind": "phase"' in read_journal(folder))
    assert engine_here([str(folder)]) == EXIT_CODES[Outcome.BUSY]
    first.kill()
    first.communicate()


def test_a_finished_run_started_again_changes_nothing(finished_run, engine_here):
    before = (finished_run / "events.jsonl").read_bytes()
    assert engine_here([str(finished_run)]) == 0
    assert (finished_run / "events.jsonl").read_bytes() == before


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_last_good_checkpoint(
    tiny_run, engine_here, monkeypatch
):
    folder = tiny_run("run", max_steps=40, save_steps=4)
    original, calls = LabeledPositionsHead.compute_loss_sum, count(1)

    def break_loss(self, model, *batch):
        loss = original(self, model, *batch)
        return loss * float("nan") if torch.is_grad_enabled() and next(calls) == 7 else loss

    monkeypatch.setattr(LabeledPositionsHead, "compute_loss_sum", break_loss)
    assert engine_here([str(folder)]) == EXIT_CODES[Outcome.DIVERGED]
    result = read_result(folder)
    assert "at step 7" in result.message
    assert result.step == 6
    assert find_latest_valid(folder).name == "step-00000004"


def test_rows_without_trained_tokens_are_a_data_error_that_names_max_length(
    tmp_path, tiny_model, engine_here
):
    folder = tiny.make_run(tmp_path / "run", tiny_model, max_length=8)
    assert engine_here([str(folder)]) == EXIT_CODES[Outcome.DATA_ERROR]
    assert_mentions(read_result(folder).message, "8 tokens", "max_length")


def test_missing_target_modules_are_a_config_error(tmp_path, tiny_model, engine_here):
    folder = tiny.make_run(tmp_path / "run", tiny_model, target_modules="qkv_proj")
    assert engine_here([str(folder)]) == EXIT_CODES[Outcome.CONFIG_ERROR]
    assert "qkv_proj" in read_result(folder).message


def test_gradient_checkpointing_gives_the_same_losses(
    finished_run, tmp_path, tiny_model, engine_here
):
    folder = tiny.make_run(tmp_path / "run", tiny_model, max_steps=12, gradient_checkpointing=True)
    assert engine_here([str(folder)]) == 0
    ours, theirs = (tiny.get_step_losses(tiny.read_events(f)) for f in (folder, finished_run))
    for step, loss in ours.items():
        assert float.fromhex(loss) == pytest.approx(float.fromhex(theirs[step]), abs=1e-4)


def test_accumulated_gradients_are_the_mean_over_all_trained_tokens():
    def make_row(length, trained):
        ids = np.arange(3, 3 + length, dtype=np.int64)
        return EncodedRow(ids, np.where(np.arange(length) >= length - trained, ids, -100))

    rows = [make_row(40, 38), make_row(40, 3)]
    gradients = []
    for batches in ([((0,),), ((1,),)], [((0,), (1,))]):
        model = families.make_family_model("llama")
        session = SimpleNamespace(
            plan=SimpleNamespace(steps=[batches], total_steps=1),
            rows=rows,
            step=0,
            total_tokens=0,
            model=model,
            head=LabeledPositionsHead(model),
            device=torch.device("cpu"),
            tokenizer=SimpleNamespace(pad_token_id=1),
            config=RunConfig(max_grad_norm=1e6),
            optimizer=torch.optim.SGD([{"params": list(model.parameters()), "rate": 0.0}], lr=0.0),
            meter=SimpleNamespace(read_memory=dict),
        )
        session.optimizer.zero_grad = lambda **_: None  # what was added up is looked at
        _, fields = take_step(session)
        gradients.append(
            (fields["loss"], [p.grad.clone() for p in model.parameters() if p.grad is not None])
        )
    (apart, one_by_one), (together, at_once) = gradients
    assert apart == pytest.approx(together, rel=1e-5)
    for ours, theirs in zip(one_by_one, at_once, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)


def test_accumulating_two_batches_is_one_step_over_all_their_tokens(
    tmp_path, tiny_model, engine_here
):
    folder = tiny.make_run(tmp_path / "run", tiny_model, max_steps=2, gradient_accumulation_steps=2)
    assert engine_here([str(folder)]) == 0
    start = next(event for event in tiny.read_events(folder) if event["kind"] == "start")
    step = next(event for event in tiny.read_events(folder) if event["kind"] == "step")
    assert start["total_steps"] == 2
    assert step["tokens"] > 160  # more than one batch's budget


def test_without_a_config_the_engine_prints_its_usage(tmp_path):
    code, errors = run_engine(tmp_path)
    assert code == EXIT_CODES[Outcome.CONFIG_ERROR]
    assert "usage: python -m training.engine RUN_DIR" in errors


def read_journal(folder):
    path = folder / "events.jsonl"
    return path.read_text() if path.exists() else ""


def wait_for(ready, seconds=60):
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


def test_prompts_beyond_max_length_are_not_sampled(tmp_path, tiny_model, engine_here):
    long = {
        "messages": [
            {"role": "user", "content": "lamp " * 400},
            {"role": "assistant", "content": "on"},
        ]
    }
    folder = tiny.make_run(
        tmp_path / "run", tiny_model, rows=[*tiny.ROWS, long, long, long], max_steps=1
    )
    assert engine_here([str(folder)]) == 0
    samples = [event for event in tiny.read_events(folder) if event["kind"] == "sample"]
    assert samples and all("lamp lamp" not in event["prompt"] for event in samples)


def test_if_every_prompt_is_too_long_the_run_continues_without_samples(
    tmp_path, tiny_model, engine_here
):
    long = {
        "messages": [
            {"role": "user", "content": "lamp " * 400},
            {"role": "assistant", "content": "on"},
        ]
    }
    folder = tiny.make_run(
        tmp_path / "run", tiny_model, rows=[*tiny.ROWS[:8], *[long] * 4], max_steps=1
    )
    assert engine_here([str(folder)]) == 0
    assert not [event for event in tiny.read_events(folder) if event["kind"] == "sample"]


def test_eva_initialization_works_with_few_rows(tmp_path, tiny_model, engine_here):
    folder = tiny.make_run(
        tmp_path / "run",
        tiny_model,
        rows=[*tiny.ROWS[:2], *tiny.ROWS[-4:]],
        max_steps=1,
        init_lora_weights="eva",
    )
    assert engine_here([str(folder)]) == 0


@pytest.mark.parametrize(
    ("setting", "facts"),
    [
        ({"rank_pattern": "donw_proj=32"}, ("rank_pattern", "donw_proj")),
        (
            {"alpha_pattern": "up_proj=8", "target_modules": "q_proj,v_proj"},
            ("alpha_pattern", "up_proj", "q_proj, v_proj"),
        ),
        ({"alpha_pattern": "down_proj=0"}, ("9999",)),
        ({"rank_pattern": "down_proj=0"}, ("9999",)),
    ],
)
def test_a_pattern_without_effect_is_rejected(tmp_path, tiny_model, engine_here, setting, facts):
    folder = tiny.make_run(tmp_path / "run", tiny_model, max_steps=1, **setting)
    assert engine_here([str(folder)]) == EXIT_CODES[Outcome.CONFIG_ERROR]
    assert_mentions(read_result(folder).message, *facts)


TEXTS = [
    {"text": f"the lamp in the {room} is on and the lamp in the hall is off"} for room in tiny.ROOMS
] * 2


def undo_last_checkpoint(folder):
    """Put a run back to before its last checkpoint, at step 8, as if it had been killed there."""
    for name in ("checkpoints/step-00000008", "adapter"):
        shutil.rmtree(folder / name)
    (folder / "result.json").unlink()


def resumed_steps(folder):
    return [event["step"] for event in tiny.read_events(folder) if event["kind"] == "resume"]


@pytest.mark.parametrize(
    "batching",
    [
        {"packing": True, "max_length": 80},
        {"batch_unit": "rows", "per_device_train_batch_size": 3},
        {"packing": True, "batch_unit": "rows", "per_device_train_batch_size": 2},
    ],
)
def test_every_batching_mode_learns_and_resumes_bit_identically(tiny_run, engine_here, batching):
    folder = tiny_run("run", **batching)
    assert engine_here([str(folder)]) == 0
    steps = [e for e in tiny.read_events(folder) if e["kind"] == "step"]
    assert steps[-1]["loss"] < steps[0]["loss"]
    losses = tiny.get_step_losses(steps)
    undo_last_checkpoint(folder)
    assert engine_here([str(folder)]) == 0
    assert resumed_steps(folder) == [4]
    assert tiny.get_step_losses(tiny.read_events(folder)) == losses


METHOD_SETTINGS = [
    {"method": "lora", "init_lora_weights": "pissa_niter_4"},
    {"method": "lora", "init_lora_weights": "eva"},
    {"method": "lora", "loraplus_lr_ratio": 8.0, "optim": "adamw_8bit"},
    {"method": "qlora", "init_lora_weights": "loftq", "optim": "paged_adamw_8bit"},
    {"method": "full", "precision": "mixed"},
    {"method": "prefix", "prefix_projection": True},
    {"method": "prompt"},
    {"method": "bottleneck", "bottleneck_size": 8},
    {"method": "ia3"},
]


@pytest.mark.parametrize(
    "method_settings", METHOD_SETTINGS, ids=lambda t: "-".join(map(str, t.values()))
)
def test_every_method_trains_and_resumes_bit_identically(tiny_run, engine_here, method_settings):
    lora_settings = {} if method_settings["method"].endswith("lora") else {"rank": 16, "alpha": 32}
    folder = tiny_run("run", **lora_settings, **method_settings)
    assert engine_here([str(folder)]) == 0
    losses = tiny.get_step_losses(tiny.read_events(folder))
    weights = [path.read_bytes() for path in (folder / "adapter").glob("*.safetensors")]
    undo_last_checkpoint(folder)
    assert engine_here([str(folder)]) == 0
    assert resumed_steps(folder) == [4]
    assert tiny.get_step_losses(tiny.read_events(folder)) == losses
    assert [path.read_bytes() for path in (folder / "adapter").glob("*.safetensors")] == weights


def test_plain_text_is_learned_and_sampled(tiny_run, engine_here):
    folder = tiny_run("text", rows=TEXTS)
    assert engine_here([str(folder)]) == 0
    samples = [e for e in tiny.read_events(folder) if e["kind"] == "sample"]
    assert samples[0]["prompt"].startswith("the lamp")
    assert samples[0]["expected"]


def test_training_stops_early_if_the_held_out_loss_does_not_improve(tiny_run, engine_here):
    folder = tiny_run(
        "early",
        learning_rate=1.0,
        max_steps=60,
        eval_steps=2,
        save_steps=50,
        early_stopping_patience=2,
    )
    assert engine_here([str(folder)]) == 0
    events = tiny.read_events(folder)
    messages = [e["text"] for e in events if e["kind"] == "log"]
    best = min((e for e in events if e["kind"] == "eval"), key=lambda e: float(e["eval_loss"]))[
        "step"
    ]
    last = max(e["step"] for e in events if e["kind"] == "step")
    assert last == best + 4 < 60
    assert f"Best step: {best}" in messages[-1]
    assert read_result(folder).outcome is Outcome.FINISHED


def test_an_attempt_that_resumes_where_training_stopped_early_trains_no_further(
    tiny_run, engine_here
):
    folder = tiny_run(
        "again",
        learning_rate=1.0,
        max_steps=60,
        eval_steps=2,
        save_steps=2,
        early_stopping_patience=2,
    )
    assert engine_here([str(folder)]) == 0
    steps = [e["step"] for e in tiny.read_events(folder) if e["kind"] == "step"]
    (folder / "result.json").unlink()  # as if it had been killed after its last checkpoint
    assert engine_here([str(folder)]) == 0
    assert [e["step"] for e in tiny.read_events(folder) if e["kind"] == "step"] == steps
    assert read_result(folder).step == steps[-1]


@pytest.mark.parametrize(
    "change",
    [
        {"micro_batch_splits": 2},
        {"gradient_checkpointing": True},
        {"max_length": 40},
        {"optim": "adamw_8bit"},
        {"method": "qlora"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_run_resumes_with_settings_that_need_less_memory(tiny_run, engine_here, change):
    folder = tiny_run(max_steps=4, save_steps=2)
    assert engine_here([str(folder)]) == 0
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_steps": 8, **change}))
    (folder / "result.json").unlink()
    assert engine_here([str(folder)]) == 0
    events = tiny.read_events(folder)
    resumed = next(event for event in events if event["kind"] == "resume")
    steps = [event["step"] for event in events if event["kind"] == "step"]
    assert (resumed["step"], steps) == (4, list(range(1, 9)))
    messages = [event["text"] for event in events if event["kind"] == "log"]
    assert any("optimizer state is reset" in text for text in messages) is ("optim" in change)


def test_micro_batches_give_the_same_losses(finished_run, tmp_path, tiny_model, engine_here):
    folder = tiny.make_run(tmp_path / "run", tiny_model, max_steps=12, micro_batch_splits=2)
    assert engine_here([str(folder)]) == 0
    ours, theirs = (tiny.get_step_losses(tiny.read_events(f)) for f in (folder, finished_run))
    for step, loss in ours.items():
        assert float.fromhex(loss) == pytest.approx(float.fromhex(theirs[step]), abs=1e-4)
