"""The journal of a run: every event on a line of its own, numbered from 1. It does not know who
reads it.

One `write()` of one line with O_APPEND: a line that was written outlives a kill -9 of every
process, since it is in the kernel's page cache. Only the kinds marked `sync` pay for an fsync, so
that a step costs 10 us and not 10 ms.
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

from training.engine.metrics import metric_names

JOURNAL = "events.jsonl"


@dataclass(frozen=True)
class Kind:
    """A kind of event: its fields besides metrics (metrics.py), and whether it must be on the disk
    before the engine goes on.
    """

    words: str
    fields: frozenset[str]
    sync: bool = False


def _kind(words: str, fields: str, *, sync: bool = False) -> Kind:
    return Kind(words, frozenset(fields.split()), sync)


KINDS: dict[str, Kind] = {
    "phase": _kind(
        "what the engine is doing, with progress where it can be counted", "name done total"
    ),
    "start": _kind(
        "the plan, once the data and the model are there",
        "attempt step total_steps epochs rows heldout_rows tokens trained_tokens rows_cut "
        "rows_empty trainable_parameters parameters device precision optimizer threads "
        "chat_template versions",
    ),
    "resume": _kind(
        "training goes on from a checkpoint; later steps of earlier attempts no longer count",
        "attempt step",
    ),
    "step": _kind(
        "one optimizer step",
        "step devices",
    ),
    "eval": _kind("held-out loss", "step rows total_tokens seconds best"),
    "sample": _kind("one answer to a held-out prompt", "step prompt expected answer"),
    "answers": _kind(
        "held-out prompts answered by what is exported, word for word",
        "step rows matches exact_match seconds",
    ),
    "memory": _kind(
        "memory at a moment that is not a step",
        "moment step memory_bytes memory_peak_bytes devices",
    ),
    "saving": _kind("a checkpoint is about to be written", "step", sync=True),
    "checkpoint": _kind(
        "a checkpoint is complete on the disk", "step path bytes seconds best", sync=True
    ),
    "trial": _kind(
        "a short trial before the run begins, stops early or is done; losses are [step, held-out "
        "loss] pairs",
        "number step settings steps losses outcome spent budget whole seconds",
    ),
    "tuned": _kind(
        "the trials are over: who goes on, and what rows that no trial saw say of it against the "
        "plan's own guess",
        "step winner settings trainable_parameters spent plan_loss winner_loss difference "
        "standard_error rows words",
    ),
    "log": _kind("a line for the log tail", "level text"),
    "end": _kind("the engine leaves", "outcome message step", sync=True),
}


class Journal:
    """Appends to `events.jsonl`; a half-written last line of a killed engine is cut off first."""

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / JOURNAL
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        self.seq, self.last_kind = self._recover()

    def write(self, kind: str, **payload: Any) -> int:
        """Append one event and return its number.

        Raises:
            ValueError: the kind or a field of its payload is declared in neither KINDS nor METRICS.
        """
        declared = KINDS.get(kind)
        if declared is None or not declared.fields.union(metric_names(kind)) >= payload.keys():
            raise ValueError(f"event {kind} with {sorted(payload)} is not declared in KINDS")
        event = {
            "seq": self.seq + 1,
            "time": time.time(),
            "kind": kind,
            **{k: finite(v) for k, v in payload.items()},
        }
        self._append(json.dumps(event, allow_nan=False).encode() + b"\n")
        self.seq += 1
        self.last_kind = kind
        if declared.sync:
            os.fsync(self._file)
        return self.seq

    def _append(self, line: bytes) -> None:
        """The whole line or nothing: on a full disk the system may take only a part."""
        begin = os.fstat(self._file).st_size
        try:
            written = os.write(self._file, line)
        except OSError:
            written = 0
            raise
        finally:
            if written < len(line):
                os.ftruncate(self._file, begin)
        if written < len(line):
            raise OSError(errno.ENOSPC, "the journal's disk is full", str(self.path))

    def close(self) -> None:
        os.close(self._file)

    def _recover(self) -> tuple[int, str]:
        size = os.fstat(self._file).st_size
        last = b""
        end = 0
        window = 1 << 16
        while size and not last:
            start = max(0, size - window)
            tail = os.pread(self._file, size - start, start)
            whole = tail.rfind(b"\n") + 1
            before = tail.rfind(b"\n", 0, max(0, whole - 1)) + 1
            if whole and (before or start == 0):
                last, end = tail[before:whole], start + whole
            elif start == 0:
                break
            window *= 2
        os.ftruncate(self._file, end)
        if not last:
            return 0, ""
        event = json.loads(last)
        return int(event["seq"]), str(event["kind"])


def finite(value: Any) -> Any:
    """JSON has no NaN: a float that is not finite travels as "nan", "inf" or "-inf", which float()
    reads back.
    """
    return repr(float(value)) if isinstance(value, float) and not math.isfinite(value) else value


def read_events(
    path: Path, offset: int = 0, limit: int = 5_000
) -> Iterator[tuple[dict[str, Any], int]]:
    """Whole lines from a byte offset on, each with the offset after it. A torn last line is left
    for later.
    """
    with path.open("rb") as file:
        file.seek(offset)
        for _ in range(limit):
            line = file.readline()
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            yield json.loads(line), offset
