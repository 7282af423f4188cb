"""Fixtures for all tests of adapters."""

import contextlib
import io
import json
import subprocess
from pathlib import Path

import pytest
import torch

from tests.adapters.importing import CONFIG, WEIGHTS, compute_logits
from tests.registry import train_version
from training.jobs import runner


@pytest.fixture(autouse=True)
def no_heartbeat(monkeypatch):
    """A test's transaction locks SQLite, so a heartbeat thread would wait 20 s for the lock."""
    monkeypatch.setattr(runner, "HEARTBEAT_SECONDS", 600.0)


@pytest.fixture(autouse=True)
def imports_in_process(request, monkeypatch):
    """The program that checks imports runs in this process, except in tests marked
    `own_process`.
    """
    if not request.node.get_closest_marker("own_process"):
        monkeypatch.setattr("adapters.registry.imports.run_child", run_import_here)


def run_import_here(module, folder, **_limits):
    from adapters.programs import adapter_import
    from training.child_process import PARAMS_FILE, emit_error
    from training.errors import UserError

    assert module == adapter_import.__name__
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        try:
            params = json.loads((Path(folder) / PARAMS_FILE).read_text())
            adapter_import.run_import(Path(folder), params)
        except UserError as error:
            emit_error(error)
    return subprocess.CompletedProcess([module], 0, out.getvalue(), "")


@pytest.fixture
def adapter_files(alice, base_model, data, device, no_queue, engine_once):
    """The files of a trained adapter, in memory."""
    version = train_version(alice, base_model, data, engine_once, max_steps=2)
    files = {name: (version.folder / name).read_bytes() for name in (WEIGHTS, CONFIG)}
    version.delete()
    return files


@pytest.fixture
def peft_folder(base_model, tmp_path):
    """Writes an adapter of the base with plain PEFT, and returns its folder and its logits."""
    from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    def write(dtype=torch.float32, is_ia3=False, **config):
        torch.manual_seed(3)
        base = AutoModelForCausalLM.from_pretrained(base_model.folder, dtype=torch.float32)
        lora = {} if is_ia3 else {"r": 3, "lora_alpha": 5}
        peft_config = (IA3Config if is_ia3 else LoraConfig)(**{**lora, **config})
        model = get_peft_model(base, peft_config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name or "ia3_" in name:
                    parameter.normal_(std=0.3)
        model.to(dtype).save_pretrained(tmp_path / "peft")
        again = AutoModelForCausalLM.from_pretrained(base_model.folder, dtype=torch.float32)
        reference = PeftModel.from_pretrained(again, tmp_path / "peft")
        return tmp_path / "peft", compute_logits(reference)

    return write
