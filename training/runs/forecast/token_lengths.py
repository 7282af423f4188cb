"""Token lengths of a dataset under a model's tokenizer, measured once and cached next to the data,
and previews of single rows token by token.

Both run in a child process (`training.engine.data.preview`), because a model's chat template is
untrusted code.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from django.conf import settings
from numpy.typing import NDArray

from training.catalog.models import BaseModel
from training.child_process import GIB, ProgramLimits, run_child
from training.child_slots import SlotsBusy
from training.datasets.models import DatasetVersion
from training.engine.batches import build_epoch_batches, get_sequence_length
from training.engine.config import RunConfig
from training.engine.files import write_atomically
from training.engine.row_numbers import list_row_numbers
from training.errors import StorageError, UserError
from training.people.current_user import hold_program_slot

# About 1 ms each. Of a larger dataset every n-th row is measured, and the page says so.
MAX_MEASURED_ROWS = 20_000
LENGTH_CHOICES = (128, 256, 512, 1024, 2048, 4096, 8192)  # of the data page
TIMEOUT_SECONDS = 150
PREVIEW_LIMITS = ProgramLimits(address_space_bytes=3 * GIB, counted_bytes=2 * GIB, cpu_seconds=20)
MEASUREMENT_LIMITS = replace(PREVIEW_LIMITS, cpu_seconds=120)
RETRY_AFTER_SECONDS = 600
HISTOGRAM_BINS = 40
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "chat_template.jinja",
)


@dataclass(frozen=True)
class TokenLengths:
    """int32 arrays with one number per measured row: all tokens, trained tokens, and the position
    of the first trained token.
    """

    total: NDArray[np.int32]
    trained: NDArray[np.int32]
    first_trained: NDArray[np.int32]
    # Trained tokens before that position, for each of LENGTH_CHOICES.
    trained_by_length: dict[int, NDArray[np.int32]]
    rows: int  # of the whole dataset; a large one is only measured in part
    template: str
    # Numbers of the rows that the chat template rejects, and why it rejects the first of them
    invalid_numbers: tuple[int, ...] = ()
    faults: Mapping[int, str] = field(default_factory=dict)
    stride: int = 1  # every n-th row was measured
    special_token_rows: int = 0  # rows of plain text that hold special tokens of the model

    @property
    def measured_rows(self) -> int:
        return len(self.total)

    @property
    def invalid_rows(self) -> int:
        return len(self.invalid_numbers)

    @property
    def fault(self) -> str:
        """The first invalid row and what is wrong with it; empty if all rows are valid."""
        if not self.invalid_numbers:
            return ""
        number = self.invalid_numbers[0]
        return f"row {number}: {self.faults.get(number, 'see the data page')}"

    def exclude_rows(self, excluded_rows: str) -> TokenLengths:
        """The lengths without the rows that the setting `excluded_rows` names."""
        excluded = set(list_row_numbers(excluded_rows, self.rows))
        return self.select_rows(lambda number: number not in excluded, self.rows - len(excluded))

    def take_first(self, rows: int) -> TokenLengths:
        """The lengths of the first rows."""
        return self.select_rows(lambda number: number <= rows, min(rows, self.rows))

    def select_rows(self, is_selected: Callable[[int], bool], rows: int) -> TokenLengths:
        """The lengths of the rows with these numbers, `rows` in all."""
        if rows == self.rows:
            return self
        selected = np.array(
            [is_selected(index * self.stride + 1) for index in range(self.measured_rows)],
            dtype=bool,
        )
        return replace(
            self,
            total=self.total[selected],
            trained=self.trained[selected],
            first_trained=self.first_trained[selected],
            trained_by_length={
                length: trained[selected] for length, trained in self.trained_by_length.items()
            },
            rows=rows,
            invalid_numbers=tuple(filter(is_selected, self.invalid_numbers)),
        )

    def truncate_lengths(self, max_length: int) -> list[int]:
        """Lengths after truncation, without the rows that have no trained token left."""
        lengths: list[int] = np.minimum(self.total, max_length)[
            self.first_trained < max_length
        ].tolist()
        return lengths

    @property
    def sample_scale(self) -> float:
        """Rows of the dataset per measured row."""
        return self.rows / max(1, self.measured_rows)


def get_stride(rows: int) -> int:
    """Every n-th row of a dataset of `rows` rows is measured."""
    return max(1, -(-rows // MAX_MEASURED_ROWS))


def run_preview(request: dict[str, Any]) -> dict[str, Any]:
    """Run the preview process on a request and return its response.

    Raises:
        SlotsBusy: too many programs run on this host.
        StorageError: the disk is full or read-only.
        UserError: the process reported an error, failed, or took longer than TIMEOUT_SECONDS.
    """
    try:
        limits = PREVIEW_LIMITS if "rows" in request else MEASUREMENT_LIMITS
        with hold_program_slot(limits.counted_bytes):
            completed = run_child(
                "training.engine.data.preview",
                stdin=json.dumps(request),
                cwd=settings.BASE_DIR,
                seconds=TIMEOUT_SECONDS,
                limits=limits,
            )
    except subprocess.TimeoutExpired as error:
        raise UserError(
            "This model's chat template took too long. It may contain an endless loop.",
            field="model",
            code="preview_failed",
        ) from error
    if completed.returncode or not completed.stdout:
        raise UserError(
            "This model's tokenizer or chat template failed (out of time or memory).",
            field="model",
            code="preview_failed",
        )
    response: dict[str, Any] = json.loads(completed.stdout)
    if "error" in response:
        if response["code"] in StorageError.codes:
            raise StorageError(response["error"], code=response["code"])
        raise UserError(response["error"], field="model", code=response["code"])
    return response


def get_lengths_path(
    version: DatasetVersion, model: BaseModel, split: str, train_on_prompt: bool
) -> Path:
    files = [model.folder / name for name in TOKENIZER_FILES]
    # A changed tokenizer needs a new measurement.
    tokenizer_state = "|".join(
        f"{file}:{file.stat().st_mtime_ns}" for file in files if file.is_file()
    )
    key = hashlib.sha256(tokenizer_state.encode()).hexdigest()[:16]
    name = f"{key}-{split}{'-prompt' if train_on_prompt else ''}"
    return Path(settings.HOME) / "data" / version.digest / "lengths" / f"{name}.npz"


def get_cached_lengths(
    version: DatasetVersion,
    model: BaseModel,
    *,
    train_on_prompt: bool = False,
    split: str = "train",
) -> TokenLengths | None:
    """The lengths if they have been measured, else None."""
    path = get_lengths_path(version, model, split, train_on_prompt)
    metadata_path = path.with_suffix(".json")
    if not metadata_path.is_file():
        return None
    metadata = json.loads(metadata_path.read_text())
    if "faults" not in metadata:  # measured by an older version of SnapML
        return None
    with np.load(path) as arrays:
        trained_by_length = {length: arrays[f"trained_{length}"] for length in LENGTH_CHOICES}
        return TokenLengths(
            arrays["total"],
            arrays["trained"],
            arrays["first"],
            trained_by_length,
            rows=metadata["rows"],
            template=metadata["template"],
            invalid_numbers=tuple(arrays["invalid"].tolist()),
            faults={int(number): fault for number, fault in metadata["faults"].items()},
            stride=get_stride(metadata["rows"]),
            special_token_rows=metadata["special_token_rows"],
        )


def get_run_lengths(
    version: DatasetVersion, model: BaseModel, config: RunConfig
) -> TokenLengths | None:
    """The lengths of the rows that a run with these settings trains on, if they have been measured,
    else None.
    """
    lengths = get_cached_lengths(version, model, train_on_prompt=config.train_on_prompt)
    return lengths and lengths.exclude_rows(config.excluded_rows)


def get_lengths(
    version: DatasetVersion,
    model: BaseModel,
    *,
    train_on_prompt: bool = False,
    split: str = "train",
) -> TokenLengths:
    """The lengths, from the cache or measured now: about 2 s plus 1 ms per row, for up to
    MAX_MEASURED_ROWS rows.

    Raises:
        UserError: see `run_preview`.
    """
    cached = get_cached_lengths(version, model, train_on_prompt=train_on_prompt, split=split)
    if cached is not None:
        return cached
    path = get_lengths_path(version, model, split, train_on_prompt)
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = version.count_rows(split)
    request = {
        "model": str(model.folder),
        "file": str(version.split_path(split)),
        "stride": get_stride(rows),
        "into": str(path),
        "train_on_prompt": train_on_prompt,
        "lengths": LENGTH_CHOICES,
    }
    failed = path.with_suffix(".failed")
    if failed.is_file() and failed.stat().st_mtime > time.time() - RETRY_AFTER_SECONDS:
        raise read_failure(failed)
    try:
        response = run_preview(request)
    except (SlotsBusy, StorageError):
        raise
    except UserError as error:
        # Cached for RETRY_AFTER_SECONDS, or each visit of the page would wait for the timeout.
        fields = {"message": error.message, "field": error.field, "code": error.code}
        write_atomically(failed, json.dumps(fields))
        raise
    metadata = {"rows": rows} | {
        name: response[name] for name in ("template", "faults", "special_token_rows")
    }
    write_atomically(path.with_suffix(".json"), json.dumps(metadata))
    lengths = get_cached_lengths(version, model, train_on_prompt=train_on_prompt, split=split)
    assert lengths is not None
    return lengths


def read_failure(path: Path) -> UserError:
    """The error of a measurement that failed a short time ago."""
    text = path.read_text()
    try:
        return UserError(**json.loads(text))
    except ValueError:  # an older version of SnapML wrote the message alone
        return UserError(text, field="model")


def preview_tokens(
    model: BaseModel, rows: list[dict[str, Any]], *, max_length: int, train_on_prompt: bool
) -> dict[str, Any]:
    """Each row as spans of trained, masked and truncated tokens, and which chat template was used.

    Raises:
        UserError: see `run_preview`.
    """
    request = {
        "model": str(model.folder),
        "rows": rows,
        "max_length": max_length,
        "train_on_prompt": train_on_prompt,
    }
    return run_preview(request)


def get_truncation_stats(lengths: TokenLengths, max_length: int) -> dict[str, Any]:
    """At this max_length: truncated rows, rows without a trained token, and tokens of the rest."""
    usable = lengths.first_trained < min(max_length, 2**30)
    row_lengths = np.minimum(lengths.total, max_length)
    return {
        "rows": lengths.rows,
        "measured_rows": lengths.measured_rows,
        "longest": int(lengths.total.max(initial=0)),
        "truncated": int((lengths.total > max_length).sum()),
        "truncated_share": float((lengths.total > max_length).mean())
        if lengths.measured_rows
        else 0.0,
        "empty": int((~usable).sum()),
        "empty_share": float((~usable).mean()) if lengths.measured_rows else 0.0,
        "tokens": int(row_lengths[usable].sum() * lengths.sample_scale),
        "answer_tokens": int(
            count_trained_within(lengths, max_length)[usable].sum() * lengths.sample_scale
        ),
        "template": lengths.template,
        "fault": lengths.fault,
        "invalid": lengths.invalid_rows,
        "invalid_numbers": lengths.invalid_numbers,
        "special_token_rows": lengths.special_token_rows,
    }


def count_trained_within(lengths: TokenLengths, max_length: int) -> NDArray[np.int32]:
    """Trained tokens of each row up to a length: exact for LENGTH_CHOICES, else an estimate as if
    all tokens after the first trained one were trained.
    """
    if max_length in lengths.trained_by_length:
        return lengths.trained_by_length[max_length]
    remaining = np.maximum(0, max_length - np.minimum(lengths.first_trained, 2**30))
    return np.where(
        lengths.total <= max_length, lengths.trained, np.minimum(lengths.trained, remaining)
    ).astype(np.int32)


def compute_padding(lengths: TokenLengths, config: RunConfig) -> dict[str, float]:
    """The share of padding with SnapML's batches, and with random batches of the same size."""
    row_lengths = lengths.truncate_lengths(config.max_length)
    if not row_lengths:
        return {"ours": 0.0, "random": 0.0}
    batches = build_epoch_batches(row_lengths, config, 0)
    padded_tokens = sum(
        len(batch) * max(get_sequence_length(packed, row_lengths) for packed in batch)
        for batch in batches
    )
    batch_size = max(1, round(len(row_lengths) / len(batches)))
    shuffled = np.random.default_rng(0).permutation(np.asarray(row_lengths))
    shuffled_tokens = sum(
        int(part.max()) * len(part)
        for part in np.array_split(shuffled, -(-len(row_lengths) // batch_size))
    )
    return {
        "ours": 1 - sum(row_lengths) / padded_tokens,
        "random": 1 - sum(row_lengths) / shuffled_tokens,
    }


def build_histogram(lengths: TokenLengths) -> dict[str, Any]:
    """Number of rows by prompt, answer and total tokens, over the same bins."""
    series = {
        "prompt": lengths.total - lengths.trained,
        "answer": lengths.trained,
        "total": lengths.total,
    }
    max_total = max(1, int(lengths.total.max(initial=1)))
    edges = np.unique(np.linspace(0, max_total, HISTOGRAM_BINS + 1).astype(int))
    counts = {name: np.histogram(values, edges)[0].tolist() for name, values in series.items()}
    return {"edges": edges.tolist(), **counts}
