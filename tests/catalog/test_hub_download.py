"""A download from the Hub that fails says whether the network or the disk is the cause."""

import errno

import huggingface_hub
import pytest

from tests.user_errors import raises_user_error
from training.engine.modeling.import_model import download_from_hub


@pytest.fixture
def failing_download(monkeypatch):
    """Makes the download of files raise this error."""

    class Hub:
        def list_repo_files(self, *_args, **_kwargs):
            return ["model.safetensors"]

    def set_error(error):
        def fail(*_args, **_kwargs):
            raise error

        monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)

    return set_error


def test_a_full_disk_is_not_reported_as_an_unreachable_hub(failing_download, tmp_path):
    failing_download(OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(OSError, match="No space left"):
        download_from_hub("someone/model", tmp_path, "")


def test_a_network_error_is_reported_as_an_unreachable_hub(failing_download, tmp_path):
    failing_download(ConnectionError("refused"))
    with raises_user_error(naming=["unreachable"]):
        download_from_hub("someone/model", tmp_path, "")
