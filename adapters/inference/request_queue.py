"""The queue between the HTTP handlers and the scheduler's thread. No torch here.

The program imports torch only with the first request: that takes 5 s and 410 MB, on a machine
where perhaps nobody ever uses inference.
"""

from __future__ import annotations

import queue
import threading
from collections import Counter

from adapters.inference.types import GenerationRequest, QueueFull, StreamEvent

MAX_REQUESTS = 64  # active and waiting; the next one gets status 429
MAX_REQUESTS_PER_USER = 48  # leaves room for other users


class RequestQueue:
    """Hands requests from the HTTP handlers to the scheduler and limits how many are open.

    Created by `__main__`. The event loop submits requests; the scheduler's thread takes them from
    `incoming` and finishes them.
    """

    def __init__(self) -> None:
        self.incoming: queue.Queue[GenerationRequest] = queue.Queue()
        self._has_request = threading.Event()
        self._counts = Counter[str]()  # by user
        self._lock = threading.Lock()

    @property
    def count(self) -> int:
        """Requests that are active or waiting."""
        return self._counts.total()

    def submit_request(self, request: GenerationRequest) -> None:
        """Queue a request. Its `events` get perhaps a `{"status"}`, then `{"text"}`, and at the end
        `{"done"}` or `{"error"}`.

        Set `request.cancelled` when the client disconnects. The request counts until its final
        event.

        Raises:
            QueueFull: MAX_REQUESTS are open, or MAX_REQUESTS_PER_USER of this user.
        """
        with self._lock:
            own = self._counts[request.user]
            if self.count >= MAX_REQUESTS or own >= MAX_REQUESTS_PER_USER:
                raise QueueFull(
                    f"{self.count} requests are in progress, {own} of them yours. Try again in a "
                    "few seconds."
                )
            self._counts[request.user] += 1
        self.incoming.put(request)
        self._has_request.set()

    def finish_request(self, request: GenerationRequest, event: StreamEvent) -> None:
        """Send the final event and free the request's slot."""
        with self._lock:
            self._counts[request.user] -= 1
            if not self._counts[request.user]:
                del self._counts[request.user]
        request.events.put(event)

    def wait_for_request(self) -> None:
        """Block until the first request has been submitted."""
        self._has_request.wait()
