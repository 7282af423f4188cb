"""The table of engine exits: the first matching rule decides what happens to a run."""

import signal

import pytest

from training.engine.outcome import EXIT_CODES, Outcome
from training.runs.worker.exits import EngineExit, ExitAction, StopReason, classify_exit

PREEMPTED, BUSY, DISK_FULL, CONFIG_ERROR = (
    EXIT_CODES[outcome]
    for outcome in (Outcome.PREEMPTED, Outcome.BUSY, Outcome.DISK_FULL, Outcome.CONFIG_ERROR)
)


def classify(*reasons, code=None, **facts):
    default = {
        "has_config": True,
        "has_result": False,
        "has_checkpoint": True,
        "exited_cleanly": False,
    }
    return classify_exit(EngineExit(frozenset(reasons), **{**default, **facts}, exit_code=code))


@pytest.mark.parametrize(
    ("reasons", "facts", "action"),
    [
        (list(StopReason), {"has_result": True}, ExitAction.RESULT),
        (list(StopReason), {"exited_cleanly": True}, ExitAction.DISCARDED),
        (["STOP", "EVICTION"], {"has_checkpoint": False}, ExitAction.STOPPED_EMPTY),
        (["STOP", "EVICTION"], {"exited_cleanly": True}, ExitAction.STOPPED),
        (["STOP", "EVICTION"], {"code": -signal.SIGKILL}, ExitAction.EVICTED),
        (["STOP"], {"code": -signal.SIGKILL}, ExitAction.CRASHED),
        (["EVICTION", "OVER_MEMORY"], {"exited_cleanly": True}, ExitAction.EVICTED),
        (["OVER_MEMORY", "SIGTERM"], {"code": PREEMPTED}, ExitAction.OVER_MEMORY),
        (["SIGTERM"], {"code": PREEMPTED}, ExitAction.PAUSED),
        ([], {"exited_cleanly": True}, ExitAction.PAUSED),
        (["SIGTERM"], {"code": -signal.SIGTERM}, ExitAction.PAUSED_EARLY),
        ([], {"code": -signal.SIGTERM}, ExitAction.CRASHED),
        ([], {"code": BUSY}, ExitAction.FOLDER_BUSY),
        ([], {"code": CONFIG_ERROR, "has_config": False}, ExitAction.NO_CONFIG),
        ([], {"code": CONFIG_ERROR}, ExitAction.CRASHED),  # its result is damaged
        ([], {"code": CONFIG_ERROR, "has_result": True}, ExitAction.RESULT),
        ([], {"code": None}, ExitAction.CRASHED),
        (["STOP", "EVICTION"], {"code": DISK_FULL}, ExitAction.DISK_FULL),
        (["STOP"], {"code": DISK_FULL, "has_checkpoint": False}, ExitAction.STOPPED_EMPTY),
    ],
)
def test_the_first_matching_rule_decides(reasons, facts, action):
    reasons = [StopReason[reason] if isinstance(reason, str) else reason for reason in reasons]
    assert classify(*reasons, **facts) is action
