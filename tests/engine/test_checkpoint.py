import errno

import pytest
import torch

from training.engine.config import RunConfig
from training.engine.files import write_atomically
from training.engine.train import checkpoint


class Model(torch.nn.Linear):
    def save_pretrained(self, folder, max_shard_size):
        (folder / "model.safetensors").write_text("weights")
        (folder / "config.json").write_text("{}")


@pytest.fixture
def saver(tmp_path):
    model = Model(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())

    def save_step(step):
        return checkpoint.save_checkpoint(
            tmp_path, step, checkpoint.CheckpointState(model, optimizer, RunConfig()), {"loss": 1.0}
        )

    return save_step


def test_the_latest_valid_checkpoint_is_found_and_damaged_ones_are_skipped(tmp_path, saver):
    saver(10)
    saver(20)
    damaged = saver(30)
    (damaged / "state.safetensors").write_bytes(b"short")
    assert checkpoint.find_latest_valid(tmp_path).name == "step-00000020"


def test_a_changed_file_makes_a_checkpoint_invalid(tmp_path, saver):
    folder = saver(1)
    (folder / "config.json").write_text("[]")
    assert not checkpoint.is_valid(folder)


def test_a_checkpoint_without_a_manifest_is_ignored(tmp_path, saver):
    (saver(1) / "manifest.json").unlink()
    assert checkpoint.find_latest_valid(tmp_path) is None


def test_a_full_disk_leaves_nothing_behind(tmp_path, saver, monkeypatch):
    def raise_disk_full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", raise_disk_full)
    with pytest.raises(OSError, match="No space"):
        saver(5)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_partial_checkpoints_of_a_killed_engine_are_removed(tmp_path, saver):
    leftover = tmp_path / "checkpoints" / ".tmp-3-999"
    leftover.mkdir(parents=True)
    (leftover / "state.json").write_text("{")
    saver(4)
    assert not leftover.exists()


def test_the_two_newest_checkpoints_and_the_best_one_are_kept(tmp_path, saver):
    for step in (1, 2, 3, 4):
        saver(step)
        checkpoint.prune_checkpoints(tmp_path, best_step=1)
    names = sorted(folder.name for folder in checkpoint.list_checkpoints(tmp_path))
    assert names == ["step-00000001", "step-00000003", "step-00000004"]


def test_a_checkpoint_has_no_pickled_files(tmp_path, saver):
    assert {path.suffix for path in saver(1).iterdir()} == {".json", ".safetensors"}


def test_an_atomic_write_leaves_no_other_file(tmp_path):
    write_atomically(tmp_path / "a.json", "1")
    write_atomically(tmp_path / "a.json", "2")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_text() == "2"
