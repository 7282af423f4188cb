"""Failures of an engine are reported as what they are: storage, memory, a lost device, or an error
that a retry would repeat.
"""

import errno
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from tests import tiny
from tests.user_errors import assert_mentions
from training.engine.events import Journal
from training.engine.files import describe_storage_error, write_atomically
from training.engine.outcome import EXIT_CODES, Outcome, read_result
from training.engine.train import attempt as attempt_module
from training.engine.train import checkpoint, loop
from training.engine.train import session as session_module
from training.engine.train.attempt import Attempt
from training.errors import find_storage_error, get_errno

DISK_FULL, FAULT = EXIT_CODES[Outcome.DISK_FULL], EXIT_CODES[Outcome.FAULT]


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a file system of this size: `small_disk("64k")` returns its folder."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(size):
        try:
            options = ["-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]
            subprocess.run(["mount", *options], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"this user or container cannot mount a file system: {error}")
        return folder

    yield mount
    subprocess.run(["umount", "--lazy", folder], check=False, capture_output=True)


def make_read_only(folder):
    subprocess.run(["mount", "-o", "remount,ro", folder], check=True, capture_output=True)


def fill_disk(folder, free_bytes):
    """Leave this many bytes free."""
    (folder / "filler").write_bytes(b"x" * (shutil.disk_usage(folder).free - free_bytes))


def test_tensors_on_a_full_disk_are_a_full_disk(small_disk):
    folder = small_disk("32k")
    with pytest.raises(SafetensorError) as caught:
        save_file({"a": torch.zeros(100_000)}, folder / "x.safetensors")
    assert get_errno(caught.value) == errno.ENOSPC
    assert find_storage_error(caught.value).code == "disk_full"
    with pytest.raises(OSError, match="No space"):
        write_atomically(folder / "x.json", "x" * 100_000)
    assert not [path for path in folder.iterdir() if path.name.startswith(".x.json")]


def test_tensors_on_a_read_only_file_system_are_reported_as_such(small_disk):
    folder = small_disk("32k")
    make_read_only(folder)
    with pytest.raises(SafetensorError) as caught:
        save_file({"a": torch.zeros(1)}, folder / "x.safetensors")
    assert get_errno(caught.value) == errno.EROFS
    assert "read-only" in describe_storage_error(caught.value, folder)


def test_a_disk_that_fills_up_ends_the_run_after_two_checkpoints(
    small_disk, tiny_model, engine_here
):
    folder = tiny.make_run(small_disk("4m") / "run", tiny_model, max_steps=40, save_steps=4)
    original, steps = loop.take_step, []

    def take_step(session):
        if session.step == 6:
            fill_disk(folder.parent, 40_000)
        steps.append(session.step)
        return original(session)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "take_step", take_step)
        assert engine_here([str(folder)]) == DISK_FULL
    assert steps[-1] == 11, "the second failed checkpoint in a row is that of step 12"
    assert_mentions(read_result(folder).message, "disk is full", "step 12")
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000004"]
    (folder.parent / "filler").unlink()
    (folder / "result.json").unlink()
    assert engine_here([str(folder)]) == 0


def test_without_room_for_a_result_the_exit_code_tells(small_disk, tiny_model, engine_here):
    folder = tiny.make_run(small_disk("4m") / "run", tiny_model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "take_step", lambda _session: fill_disk(folder.parent, 0))
        assert engine_here([str(folder)]) == DISK_FULL
    assert read_result(folder) is None


def test_a_run_whose_last_checkpoint_cannot_be_written_has_not_finished(
    tiny_run, engine_here, monkeypatch
):
    folder = tiny_run("run", max_steps=4, save_steps=4)

    def fail(*_args, **_kwargs):
        raise SafetensorError("Error while serializing: I/O error: no quota (os error 122)")

    monkeypatch.setattr(checkpoint, "save_file", fail)
    assert engine_here([str(folder)]) == DISK_FULL
    assert read_result(folder).outcome is Outcome.DISK_FULL


def request_stop(_session, folder):
    (folder / "stop").write_text("save")


def expire_heartbeat(_session, folder):
    (folder / "heartbeat").touch()
    os.utime(folder / "heartbeat", (1, 1))


def wait_for_early_stopping(_session, _folder):
    """No evaluation after the first step is better, so the patience is over at step 3."""


@pytest.mark.parametrize("end", [request_stop, expire_heartbeat, wait_for_early_stopping])
def test_a_run_that_ends_early_without_its_checkpoint_did_not_end_well(
    tiny_run, engine_here, monkeypatch, end
):
    folder = tiny_run("run", max_steps=40, save_steps=40, eval_steps=1, early_stopping_patience=2)
    original = loop.take_step

    def take_step(session):
        event = original(session)
        if session.step == 3:
            end(session, folder)
        return event

    def fail(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    def evaluate(session):
        session.best_step, session.last_eval_step = 1, session.step
        yield from ()

    monkeypatch.setattr(loop.evaluate, "evaluate_loss", evaluate)
    monkeypatch.setattr(loop, "take_step", take_step)
    monkeypatch.setattr(checkpoint, "save_file", fail)
    assert engine_here([str(folder)]) == DISK_FULL
    result = read_result(folder)
    assert result.outcome is Outcome.DISK_FULL
    assert_mentions(result.message, "disk is full", "step 3")
    assert "checkpoint" not in result.message, "there is none"


def test_an_engine_on_a_read_only_file_system_ends_with_that_code(
    small_disk, tiny_model, engine_here, capsys
):
    folder = tiny.make_run(small_disk("4m") / "run", tiny_model)
    make_read_only(folder.parent)
    assert engine_here([str(folder)]) == DISK_FULL
    assert "read-only" in capsys.readouterr().err


def test_an_engine_whose_folder_vanishes_ends_with_that_code(
    tiny_run, engine_here, monkeypatch, capsys
):
    folder = tiny_run("run", save_steps=4)
    original = loop.save_checkpoint

    def remove_and_save(session, *, is_final):
        shutil.rmtree(folder)
        yield from original(session, is_final=is_final)

    monkeypatch.setattr(loop, "save_checkpoint", remove_and_save)
    assert engine_here([str(folder)]) == DISK_FULL
    assert "vanished" in capsys.readouterr().err
    assert not folder.exists()


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (IndexError("index out of range in self"), Outcome.FAULT),
        (RuntimeError("CUDA error: device-side assert triggered"), Outcome.FAULT),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied (4x8 and 9x2)"), Outcome.FAULT),
        (AttributeError("'tuple' object has no attribute 'reshape'"), Outcome.FAULT),
        (OSError("tiny does not appear to have a file named model.safetensors"), Outcome.FAULT),
        (FileNotFoundError(errno.ENOENT, "No such file", "train.jsonl"), Outcome.FAULT),
        (SafetensorError("Error while deserializing header: header too large"), Outcome.FAULT),
        (RuntimeError("CUDA error: no kernel image is available for execution"), Outcome.FAULT),
        (RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling x"), Outcome.FAULT),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), Outcome.CRASHED),
        (RuntimeError("CUDA driver initialization failed"), Outcome.CRASHED),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), Outcome.CRASHED),
        (OSError(errno.EIO, "Input/output error"), Outcome.CRASHED),
        (OSError(errno.ESTALE, "Stale file handle"), Outcome.CRASHED),
        (torch.OutOfMemoryError("CUDA out of memory"), Outcome.OUT_OF_MEMORY),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), Outcome.OUT_OF_MEMORY),
        (MemoryError(), Outcome.OUT_OF_MEMORY),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), Outcome.DISK_FULL),
        (RuntimeError("could not save (os error 28)"), Outcome.DISK_FULL),
        (RuntimeError("PytorchStreamWriter failed writing file data/3"), Outcome.DISK_FULL),
        (OSError("4096 requested and 12 written"), Outcome.DISK_FULL),
    ],
)
def test_an_error_is_classified_by_whether_a_retry_may_help(tmp_path, error, outcome):
    attempt = Attempt(tmp_path, Journal(tmp_path), number=1)
    assert attempt.classify_error(error)[0] is outcome


@pytest.mark.parametrize(
    ("error", "facts"),
    [
        (ZeroDivisionError("division by zero\nand more lines"), ("division by zero", "step 3")),
        (IndexError("index out of range in self"), ("embedding", "positions")),
    ],
)
def test_an_error_that_a_retry_would_repeat_ends_the_run_at_once_with_its_cause(
    tiny_run, engine_here, monkeypatch, error, facts
):
    original = loop.take_step

    def fail_later(session):
        if session.step == 3:
            raise error
        return original(session)

    monkeypatch.setattr(loop, "take_step", fail_later)
    folder = tiny_run()
    assert engine_here([str(folder)]) == FAULT
    result = read_result(folder)
    assert result.outcome is Outcome.FAULT
    assert_mentions(result.message, type(error).__name__, *facts)
    assert "\n" not in result.message
    events = tiny.read_events(Path(folder))
    assert any("Traceback" in event.get("text", "") for event in events)


def test_a_tokenizer_that_panics_ends_the_run_at_once_with_its_cause(
    tmp_path, tiny_model, engine_here
):
    model = tiny.copy_with_panicking_tokenizer(tiny_model, tmp_path / "model")
    folder = tiny.make_run(tmp_path / "run", model)
    assert engine_here([str(folder)]) == FAULT
    assert_mentions(read_result(folder).message, "tokenizer", "loading")


HOST_ERRORS = [
    (torch.OutOfMemoryError("CUDA out of memory"), Outcome.OUT_OF_MEMORY),
    (RuntimeError("CUDA error: an illegal memory access was encountered"), Outcome.CRASHED),
    (OSError(errno.EIO, "Input/output error"), Outcome.CRASHED),
    (OSError(errno.ENOMEM, "Cannot allocate memory"), Outcome.OUT_OF_MEMORY),
]


@pytest.mark.parametrize(("error", "outcome"), HOST_ERRORS)
@pytest.mark.parametrize("place", ["continued weights", "base model"])
def test_an_error_of_the_machine_while_loading_is_not_reported_as_wrong_settings(
    tiny_run, engine_here, monkeypatch, error, outcome, place
):
    def fail(*_args, **_kwargs):
        raise error

    if place == "base model":
        monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    else:
        monkeypatch.setattr(session_module.weights, "check_parameter_names", fail)
    folder = tiny_run("run", init_from="/x")
    assert engine_here([str(folder)]) == EXIT_CODES[outcome]


def test_a_failure_of_exact_match_is_logged_since_the_adapter_is_exported(
    tiny_run, engine_here, monkeypatch, capfd
):
    def fail(*_args):
        raise KeyError("the template broke")

    monkeypatch.setattr(attempt_module, "measure_exact_match", fail)
    folder = tiny_run("run", exact_match_rows=2)
    assert engine_here([str(folder)]) == 0
    assert read_result(folder).adapter_step is not None
    texts = [event.get("text", "") for event in tiny.read_events(folder)]
    assert any("KeyError: 'the template broke'" in text for text in texts)
    assert "Traceback" in capfd.readouterr().err  # engine.log
