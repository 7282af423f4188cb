"""The journal of a run, events.jsonl: one event per line, numbered from 1.

Each event is one `write()` with O_APPEND. A written line is in the kernel's page cache, so it
survives a SIGKILL of every process. Only kinds with `needs_fsync` are synced to disk, so that a
step event costs 10 us instead of 10 ms.
"""

from __future__ import annotations

import errno
import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.engine.metrics import get_metric_names

JOURNAL_FILE = "events.jsonl"


@dataclass(frozen=True)
class EventKind:
    """A kind of event: its fields other than metrics (metrics.py), and whether it must be on disk
    before the engine continues.
    """

    description: str
    field_names: frozenset[str]
    needs_fsync: bool = False


def _build_kind(description: str, field_names: str, *, needs_fsync: bool = False) -> EventKind:
    return EventKind(description, frozenset(field_names.split()), needs_fsync)


EVENT_KINDS: dict[str, EventKind] = {
    "phase": _build_kind(
        "what the engine is doing, with progress if it can be counted", "name done total"
    ),
    "start": _build_kind(
        "the data and the model are loaded and the steps are planned",
        "attempt step total_steps epochs rows eval_rows tokens trained_tokens truncated_rows "
        "empty_rows excluded_row_count excluded_rows excluded_eval_rows trainable_parameters "
        "parameters device precision optimizer threads chat_template versions",
    ),
    "resume": _build_kind(
        "training resumes from a checkpoint; later steps of earlier attempts are discarded",
        "attempt step",
    ),
    "step": _build_kind(
        "one optimizer step",
        "step devices",
    ),
    "eval": _build_kind("held-out loss", "step rows total_tokens seconds best"),
    "sample": _build_kind(
        "one generated answer to a held-out prompt", "step prompt expected answer"
    ),
    "exact_match": _build_kind(
        "exact match of the exported weights on held-out prompts",
        "step rows matches exact_match seconds",
    ),
    "memory": _build_kind(
        "a memory reading outside of the steps",
        "moment step memory_bytes memory_peak_bytes devices",
    ),
    "saving": _build_kind("a checkpoint is about to be written", "step", needs_fsync=True),
    "checkpoint": _build_kind(
        "a checkpoint is complete on disk", "step path bytes seconds best", needs_fsync=True
    ),
    "trial": _build_kind(
        "a tuning trial starts, stops early or is done; losses are [step, held-out loss] pairs",
        "number step settings steps losses outcome spent budget full_steps seconds",
    ),
    "tuned": _build_kind(
        "the trials are over: the winner, and its held-out loss against the plan's own settings on "
        "rows that no trial used",
        "step winner settings trainable_parameters spent plan_loss winner_loss difference "
        "standard_error rows message",
    ),
    "log": _build_kind("a log line", "level text"),
    "end": _build_kind("the engine exits", "outcome message step", needs_fsync=True),
}


class BrokenJournal(Exception):
    """The journal is damaged: a line is not an event, or part of it was lost. A retry does not
    help.
    """


class Journal:
    """Appends events to `events.jsonl`. Opening it removes an incomplete last line that a killed
    engine left.

    Raises:
        BrokenJournal: the last complete line is not an event.
    """

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / JOURNAL_FILE
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        self.seq, self.last_kind = self._recover_last_event()

    def write_event(self, kind: str, **fields: Any) -> int:
        """Append one event and return its number.

        Raises:
            ValueError: the kind or a field is declared in neither EVENT_KINDS nor METRICS.
        """
        declared = EVENT_KINDS.get(kind)
        if (
            declared is None
            or not declared.field_names.union(get_metric_names(kind)) >= fields.keys()
        ):
            raise ValueError(f"event {kind} with {sorted(fields)} is not declared in EVENT_KINDS")
        event = {
            "seq": self.seq + 1,
            "time": time.time(),
            "kind": kind,
            **{k: encode_non_finite(v) for k, v in fields.items()},
        }
        self._append_line(json.dumps(event, allow_nan=False).encode() + b"\n")
        self.seq += 1
        self.last_kind = kind
        if declared.needs_fsync:
            os.fsync(self._file)
        return self.seq

    def _append_line(self, line: bytes) -> None:
        """Append the complete line or nothing: on a full disk, write() may store only a part."""
        size_before = os.fstat(self._file).st_size
        try:
            written = os.write(self._file, line)
        except OSError:
            written = 0
            raise
        finally:
            if written < len(line):
                os.ftruncate(self._file, size_before)
        if written < len(line):
            raise OSError(errno.ENOSPC, "the journal's disk is full", str(self.path))

    def close(self) -> None:
        os.close(self._file)

    def _recover_last_event(self) -> tuple[int, str]:
        """Return the number and kind of the last event, and truncate an incomplete line after it.
        Reads the end of the file in growing windows.
        """
        size = os.fstat(self._file).st_size
        last_line = b""
        end = 0
        window = 1 << 16
        while size and not last_line:
            start = max(0, size - window)
            tail = os.pread(self._file, size - start, start)
            line_end = tail.rfind(b"\n") + 1
            line_start = tail.rfind(b"\n", 0, max(0, line_end - 1)) + 1
            if line_end and (line_start or start == 0):
                last_line, end = tail[line_start:line_end], start + line_end
            elif start == 0:
                break
            window *= 2
        os.ftruncate(self._file, end)
        if not last_line:
            return 0, ""
        event = parse_event(last_line)
        return event["seq"], event["kind"]


def encode_non_finite(value: Any) -> Any:
    """JSON has no NaN, so a non-finite float becomes "nan", "inf" or "-inf", which float() can
    parse.
    """
    return repr(float(value)) if isinstance(value, float) and not math.isfinite(value) else value


def read_events(
    path: Path, offset: int = 0, limit: int = 5_000
) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield the complete lines from a byte offset, each with the offset after it. An incomplete
    last line is left for a later call.

    Raises:
        BrokenJournal: a line is not an event.
    """
    with path.open("rb") as file:
        file.seek(offset)
        for _ in range(limit):
            line = file.readline()
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            yield parse_event(line), offset


def parse_event(line: bytes) -> dict[str, Any]:
    """Raises BrokenJournal: the line is not an event with a number, a kind and a time."""
    try:
        event: dict[str, Any] = json.loads(line)
        is_event = (
            type(event["seq"]) is int
            and isinstance(event["kind"], str)
            and isinstance(event["time"], int | float)
        )
        if not is_event:
            raise ValueError("seq, kind or time has another type")
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise BrokenJournal(f"The journal is damaged: {line[:40]!r} is not an event.") from error
    return event
