"""Runs the engine in the test process, which saves 5 s of imports."""

from contextlib import contextmanager

import pytest


@contextmanager
def engine_in_process():
    """Yield the engine's `main`, called as `main([folder])`. Process-wide torch settings are
    restored at the end.
    """
    import torch

    from training.engine.__main__ import main
    from training.engine.stop_requests import StopRequests

    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StopRequests, "install_handlers", lambda _self: None)
        yield main
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)
