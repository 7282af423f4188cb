"""Questions, and where they wait until the speaker takes them. No torch here: the program holds
none until it is first asked.

Importing it takes 5 s and 410 MB, on a machine where perhaps nobody ever asks.
"""

from __future__ import annotations

import queue
import threading

from adapters.inference.types import GenerationRequest, QueueFull, StreamEvent

MAX_REQUESTS = 64  # under way and waiting; the next one is told to come back


class RequestQueue:
    """Takes questions in, and gives their places back with the last word."""

    def __init__(self) -> None:
        self.incoming: queue.Queue[GenerationRequest] = queue.Queue()
        self._has_request = threading.Event()
        self._count = 0
        self._lock = threading.Lock()

    @property
    def count(self) -> int:
        """Questions under way and waiting."""
        return self._count

    def submit_request(self, request: GenerationRequest) -> None:
        """Take a question. `question.said` gets `{"text"}` pieces, perhaps `{"status"}` before,
        then `{"done"}` or `{"error"}`.

        A caller who goes away sets `question.hung_up`; the place is free when the last word is
        said, whatever it is.

        Raises:
            Busy: MAX_REQUESTS are under way.
        """
        with self._lock:
            if self._count >= MAX_REQUESTS:
                raise QueueFull(
                    f"{self._count} questions are being answered; try again in a few seconds."
                )
            self._count += 1
        self.incoming.put(request)
        self._has_request.set()

    def finish_request(self, request: GenerationRequest, event: StreamEvent) -> None:
        with self._lock:
            self._count -= 1
        request.events.put(event)

    def wait_for_request(self) -> None:
        """Return when the first question has come."""
        self._has_request.wait()
