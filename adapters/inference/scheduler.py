"""Continuous batching: each decode step gives every active sequence its next token. No HTTP here.

A new request joins its batch after its own prefill and leaves when it is finished, so no request
waits for the longest one. All rows of a base model share a batch where PEFT's tuner supports
different adapters in one forward pass (`LoadedModel.supports_mixed_batch`).
"""

from __future__ import annotations

import os
import queue
import time
from collections import Counter, deque
from collections.abc import Collection
from contextlib import suppress
from typing import NamedTuple

import torch

from adapters.inference.batch import ActiveSequence, Batch, count_cache_bytes
from adapters.inference.loaded_model import LoadedModel
from adapters.inference.model_cache import CapacityExceeded, ModelCache
from adapters.inference.request_queue import RequestQueue
from adapters.inference.sampling import compute_logprobs, pick_token
from adapters.inference.text import (
    InvalidRequest,
    encode_request,
    get_dropped_ids,
    resolve_max_tokens,
    send_text,
)
from adapters.inference.types import AdapterRef, BaseRef, GenerationRequest, StreamEvent
from training.engine.data.conversations import render_messages
from training.engine.data.errors import DataError, TemplateTooSlow
from training.engine.data.render_limit import (
    MAX_PROMPT_SECONDS,
    RenderLimitExceeded,
    limit_time,
)
from training.engine.modeling.host_errors import is_host_error
from training.errors import LibraryPanic, UserError, convert_panics

MAX_ACTIVE_SEQUENCES = 16
MAX_SEQUENCES_PER_USER = 15  # one user's flood leaves room for another's request
MAX_USER_SHARE = 0.5  # of the KV cache, for a user with more than one active sequence
# After this time without a request all models are unloaded, to leave the memory to training.
IDLE_SECONDS = 900.0
ERROR_CACHE_SECONDS = 300.0
SHORT_CONVERSATION = [{"role": "user", "content": "hi"}]
CANCELLED: StreamEvent = {"error": "The client disconnected."}


CHAT_TEMPLATE = "chat template"
ErrorKey = AdapterRef | BaseRef | tuple[BaseRef, str]


class CacheShareExceeded(Exception):
    """A user's sequences already have MAX_USER_SHARE of the KV cache."""


class CachedError(NamedTuple):
    time: float
    message: str
    code: str


class BatchScheduler:
    """Runs the models: takes requests from the queue and sends events back.

    Created by `__main__._run_scheduler` with the first request. `run_forever` runs in a thread of
    its own, the only one that uses torch and the models; it ends with the process.
    """

    def __init__(self, request_queue: RequestQueue) -> None:
        self.request_queue = request_queue
        self.model_cache = ModelCache()
        # Ordered by `_choose_waiting`. If the chosen request has no room, the others wait, too.
        self.waiting: deque[GenerationRequest] = deque()
        self.admitted = 0
        self.last_admitted: dict[str, int] = {}  # by user: the value of `admitted`
        self.batches: list[tuple[LoadedModel, Batch]] = []
        # Errors are cached for ERROR_CACHE_SECONDS, so that repeated requests do not load the model
        # again.
        self.recent_errors: dict[ErrorKey, CachedError] = {}

    def run_forever(self) -> None:
        """Alternate between admitting requests and one decode step. `_admit_waiting` blocks while
        there is nothing to decode.
        """
        while True:
            self._admit_waiting()
            self._decode_batches()

    def _decode_batches(self) -> None:
        """Run one decode step for every batch.

        This is a separate function so that its local variables do not keep a model in memory while
        the next one is loaded.
        """
        for loaded_model, batch in list(self.batches):
            self._decode_batch(loaded_model, batch)
        self.batches = [
            (loaded_model, batch) for loaded_model, batch in self.batches if batch.sequences
        ]

    def _decode_batch(self, loaded_model: LoadedModel, batch: Batch) -> None:
        """Generate one token for every row of a batch. Finished and canceled sequences leave it.

        An error ends this batch's requests; other batches continue.
        """
        try:
            # Rows of clients that have disconnected leave before they cost another step.
            self._finish_sequences(
                batch,
                [
                    (sequence, CANCELLED)
                    for sequence in batch.sequences
                    if sequence.request.cancelled.is_set()
                ],
            )
            if batch.sequences:
                # One forward pass for all rows, then each row samples and sends its own token.
                with torch.inference_mode():
                    logits = batch.decode_step(loaded_model)
                finished = [
                    (sequence, self._try_process_logits(loaded_model, sequence, row))
                    for sequence, row in zip(batch.sequences, logits, strict=True)
                ]
                self._finish_sequences(
                    batch, [(sequence, event) for sequence, event in finished if event is not None]
                )
        except Exception as error:  # noqa: BLE001 reported to the clients
            exit_if_device_lost(error)
            failed_sequences, batch.sequences = batch.sequences, []
            for sequence in failed_sequences:
                self.request_queue.finish_request(sequence.request, build_error_event(error))

    def _try_process_logits(
        self, loaded_model: LoadedModel, sequence: ActiveSequence, logits: torch.Tensor
    ) -> StreamEvent | None:
        """Like `_process_logits`, but an invalid row ends that row only; the others continue."""
        try:
            with convert_panics():
                return self._process_logits(loaded_model, sequence, logits)
        except (InvalidRequest, LibraryPanic) as error:
            return build_error_event(error)

    def _finish_sequences(
        self, batch: Batch, finished: list[tuple[ActiveSequence, StreamEvent]]
    ) -> None:
        if finished:
            batch.remove_sequences([sequence for sequence, _ in finished])
        for sequence, event in finished:
            self.request_queue.finish_request(sequence.request, event)

    def _admit_waiting(self) -> None:
        """Start waiting requests while there is room. Blocks only if no sequence is active. Beside
        active ones at most one starts before each decode step, however short it is.
        """
        full_users: set[str] = set()
        while sum(len(batch.sequences) for _, batch in self.batches) < MAX_ACTIVE_SEQUENCES:
            self._receive_requests()
            if not self.waiting:
                # No request is waiting: take a new one, or return at once to continue decoding.
                # With nothing to decode, block; after IDLE_SECONDS, unload the models.
                try:
                    self.waiting.append(
                        self.request_queue.incoming.get(
                            block=not self.batches, timeout=IDLE_SECONDS
                        )
                    )
                except queue.Empty:
                    if not self.batches:
                        self.model_cache.evict_all()
                    return
            request = self._choose_waiting(full_users)
            if request is None:
                return
            try:
                with convert_panics():
                    is_admitted = self._admit_request(request)
                if not is_admitted:
                    return  # smaller requests may not overtake it, or it could wait forever
            except CacheShareExceeded:
                full_users.add(request.user)
                continue
            except Exception as error:  # noqa: BLE001 reported to the client
                exit_if_device_lost(error)
                self.request_queue.finish_request(request, build_error_event(error))
            self.waiting = deque(other for other in self.waiting if other is not request)
            self.admitted += 1
            self.last_admitted[request.user] = self.admitted
            # A batch is empty if its first sequence could not join. It would keep its model in
            # memory, and this loop from blocking.
            self.batches = [
                (loaded_model, batch) for loaded_model, batch in self.batches if batch.sequences
            ]
            if self.batches:
                return

    def _choose_waiting(self, full_users: Collection[str]) -> GenerationRequest | None:
        """The oldest request of the user with the fewest active sequences, and of those the one
        served least recently. None if all users have MAX_SEQUENCES_PER_USER, or are `full_users`.
        """
        active = Counter(
            sequence.request.user for _, batch in self.batches for sequence in batch.sequences
        )
        allowed = [
            request
            for request in self.waiting
            if active[request.user] < MAX_SEQUENCES_PER_USER and request.user not in full_users
        ]
        return min(
            allowed,
            key=lambda request: (active[request.user], self.last_admitted.get(request.user, 0)),
            default=None,
        )

    def _receive_requests(self) -> None:
        """Take all new requests, and finish those whose clients have disconnected."""
        with suppress(queue.Empty):
            while True:
                self.waiting.append(self.request_queue.incoming.get_nowait())
        cancelled, remaining = deque[GenerationRequest](), deque[GenerationRequest]()
        for request in self.waiting:
            (cancelled if request.cancelled.is_set() else remaining).append(request)
        self.waiting = remaining
        for request in cancelled:
            self.request_queue.finish_request(request, CANCELLED)

    def _admit_request(self, request: GenerationRequest) -> bool:
        """Load the model and adapter and run the prefill. Returns False if the request has to wait
        until others are finished.

        Raises:
            CacheShareExceeded: it has to wait for others of its user.
        """
        self._check_recent_errors(request)
        # 1. The base model, if it fits beside those in use.
        if request.base not in self.model_cache.models:
            self._send_status(request, "loading the base model")
        try:
            loaded_model = self.model_cache.get_model(request.base, self._busy_bases())
        except CapacityExceeded:
            return False
        except Exception as error:
            if not is_host_error(error):
                self._cache_error(request.base, f"The model cannot be loaded: {str(error)[:300]}")
            raise
        # 2. The adapter. One of another PEFT type replaces the current ones once they are idle.
        if not loaded_model.is_compatible(request.adapter):
            if loaded_model.base in self._busy_bases():
                return False
        elif request.adapter is not None and request.adapter not in loaded_model.adapter_names:
            self._send_status(request, "loading the adapter")
        self._ensure_adapter(loaded_model, request)
        # 3. The KV cache, at its final length. The first sequence always fits.
        request.prompt_ids = request.prompt_ids or self._encode_request(loaded_model, request)
        max_tokens = resolve_max_tokens(loaded_model, request, len(request.prompt_ids))
        new_bytes = loaded_model.cache_bytes_per_token * (len(request.prompt_ids) + max_tokens)
        own_bytes = self._cache_bytes(user=request.user)
        if own_bytes and own_bytes + new_bytes > MAX_USER_SHARE * self.model_cache.kv_cache_bytes:
            raise CacheShareExceeded
        if self.batches and self._cache_bytes() + new_bytes > self.model_cache.kv_cache_bytes:
            return False
        with torch.inference_mode():
            self._prefill_request(loaded_model, request, max_tokens)
        return True

    def _check_recent_errors(self, request: GenerationRequest) -> None:
        """Raises InvalidRequest: the adapter or the chat template failed a short time ago."""
        oldest = time.monotonic() - ERROR_CACHE_SECONDS
        self.recent_errors = {
            key: error for key, error in self.recent_errors.items() if error.time > oldest
        }
        keys: list[ErrorKey] = [request.base, *filter(None, [request.adapter])]
        if request.prompt is None:
            keys.append((request.base, CHAT_TEMPLATE))
        for key in keys:
            if key in self.recent_errors:
                error = self.recent_errors[key]
                raise InvalidRequest(error.message, code=error.code)

    def _cache_error(self, key: ErrorKey, message: str, code: str = "broken_model") -> None:
        self.recent_errors[key] = CachedError(time.monotonic(), message, code)

    def _ensure_adapter(self, loaded_model: LoadedModel, request: GenerationRequest) -> None:
        """Load the request's adapter. An error is cached: an adapter that fails half way costs
        a new load of the base model.
        """
        try:
            with convert_panics():
                loaded_model.ensure_adapter(request.adapter, self._adapters_in_use(loaded_model))
        except Exception as error:
            if request.adapter is None or is_host_error(error):
                raise
            message = f"The adapter cannot be loaded: {str(error)[:300]}"
            self._cache_error(request.adapter, message, "broken_adapter")
            raise InvalidRequest(message, code="broken_adapter") from error

    def _encode_request(self, loaded_model: LoadedModel, request: GenerationRequest) -> list[int]:
        """The ids of the prompt. The error of a chat template that is too slow for any conversation
        is cached.
        """
        try:
            with limit_time(MAX_PROMPT_SECONDS):
                return encode_request(loaded_model, request)
        except (TemplateTooSlow, RenderLimitExceeded) as error:
            slow = TemplateTooSlow()
            try:
                render_messages(loaded_model.tokenizer, {"messages": SHORT_CONVERSATION})
            except TemplateTooSlow:
                self._cache_error((request.base, CHAT_TEMPLATE), slow.message, slow.code)
            raise slow from error

    def _cache_bytes(self, user: str | None = None) -> int:
        """What the KV caches can grow to, of all rows or of a user's. In a batch every row is as
        long as the longest one.
        """
        return sum(
            loaded_model.cache_bytes_per_token
            * sum(user in (None, sequence.request.user) for sequence in batch.sequences)
            * max(sequence.prompt_tokens + sequence.max_tokens for sequence in batch.sequences)
            for loaded_model, batch in self.batches
            if batch.sequences
        )

    def _send_status(self, request: GenerationRequest, status: str) -> None:
        """Send a status once, although a waiting request is tried again at every step."""
        if status not in request.sent_statuses:
            request.sent_statuses.add(status)
            request.events.put({"status": status})

    def _busy_bases(self) -> set[BaseRef]:
        return {loaded_model.base for loaded_model, batch in self.batches if batch.sequences}

    def _adapters_in_use(self, loaded_model: LoadedModel) -> set[AdapterRef]:
        sequences = [
            sequence
            for other, batch in self.batches
            if other is loaded_model
            for sequence in batch.sequences
        ]
        return {
            sequence.request.adapter
            for sequence in sequences
            if sequence.request.adapter is not None
        }

    def _prefill_request(
        self, loaded_model: LoadedModel, request: GenerationRequest, max_tokens: int
    ) -> None:
        """Run the prefill, send the first token, and add the sequence to a batch."""
        ids = request.prompt_ids
        generator = torch.Generator(loaded_model.device)
        generator.seed() if request.seed is None else generator.manual_seed(request.seed)
        dropped_ids = get_dropped_ids(loaded_model, request.answer_format)
        sequence = ActiveSequence(request, len(ids), max_tokens, generator, dropped_ids=dropped_ids)
        output = loaded_model.run_prefill(
            torch.tensor([ids], device=loaded_model.device),
            request.adapter,
            all_logits=request.needs_logprobs,
        )
        if request.needs_logprobs:
            request.events.put(
                {"logprobs": compute_logprobs(output.logits[0, -len(ids) :], ids), "ids": ids}
            )
        loaded_model.cache_bytes_per_token = count_cache_bytes(output.cache) // max(
            1, output.cache.get_seq_length()
        )
        event = self._process_logits(loaded_model, sequence, output.logits[0, -1])
        if event is not None:
            self.request_queue.finish_request(request, event)
            return
        self._batch_for(loaded_model, request.adapter, output.cache).add_sequence(
            sequence, output.cache
        )

    def _batch_for(
        self, loaded_model: LoadedModel, adapter: AdapterRef | None, cache: object
    ) -> Batch:
        """A batch that a sequence with this adapter and cache can join, or a new one."""
        for other, batch in self.batches:
            can_share = loaded_model.supports_mixed_batch or all(
                sequence.request.adapter == adapter for sequence in batch.sequences
            )
            if other is loaded_model and can_share and batch.can_join(cache):
                return batch
        new_batch = Batch()
        self.batches.append((loaded_model, new_batch))
        return new_batch

    def _process_logits(
        self, loaded_model: LoadedModel, sequence: ActiveSequence, logits: torch.Tensor
    ) -> StreamEvent | None:
        """Choose the next token and send the new text. Returns the final event if the answer is
        complete.

        Raises:
            InvalidRequest: the logits are not finite.
        """
        request = sequence.request
        if not bool(torch.isfinite(logits).all()):
            raise InvalidRequest(
                "The model's logits are not finite: the training of this version has diverged."
            )
        token = pick_token(
            logits,
            temperature=request.temperature,
            top_p=request.top_p,
            generator=sequence.generator,
        )
        sequence.token = token
        is_eos = token in loaded_model.stop_ids
        if not is_eos:
            sequence.ids.append(token)
        is_finished = is_eos or len(sequence.ids) >= sequence.max_tokens
        is_stopped = send_text(loaded_model, sequence, is_final=is_finished)
        if not is_finished and not is_stopped:
            return None
        reason = "tool_calls" if sequence.sent.calls else "stop"
        return {
            "done": reason if is_eos or is_stopped else "length",
            "prompt_tokens": sequence.prompt_tokens,
            "completion_tokens": len(sequence.ids),
            "tokens_per_second": len(sequence.ids) / (time.monotonic() - sequence.started_at),
        }


def build_error_event(error: Exception) -> StreamEvent:
    """The final event of a request that failed. `fault` is "client" if the request is invalid."""
    if isinstance(error, InvalidRequest):
        reason = {"param": error.param or None, "code": error.code or None}
        return {"error": str(error), "fault": "client", **reason}
    if isinstance(error, UserError):
        # The field of any other error is not a field of the request
        param = error.field if isinstance(error, DataError) else ""
        reason = {"param": param or None, "code": error.code or None}
        return {"error": str(error), "fault": "client", **reason}
    return {"error": f"{type(error).__name__}: {error}"}


def exit_if_device_lost(error: Exception) -> None:
    """End the process after a CUDA error, since it can no longer use the GPU. `manage.py up`
    restarts it.
    """
    if "CUDA error" in str(error):
        os._exit(70)
