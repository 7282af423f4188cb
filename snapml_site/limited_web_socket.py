"""The server's side of a WebSocket, with limits on what a client may leave unread or send ahead.

Daphne queues all messages until the application takes them, and autobahn answers each ping, also
to a client that reads nothing: 150 MB of pings took 220 MB of memory.
"""

from __future__ import annotations

from daphne.ws_protocol import WebSocketProtocol

MAX_MESSAGE_BYTES = 2**14  # the application takes 4,096 characters
MAX_QUEUED_MESSAGES = 100  # the application takes 10 a second, and closes the socket above that


class LimitedWebSocket(WebSocketProtocol):  # type: ignore[misc]
    def onPing(self, payload: bytes) -> None:
        if self.is_write_paused:
            self.transport.abortConnection()
        else:
            super().onPing(payload)

    def onMessage(self, payload: bytes, isBinary: bool) -> None:
        is_flood = self.application_queue.qsize() >= MAX_QUEUED_MESSAGES
        if is_flood or len(payload) > MAX_MESSAGE_BYTES:
            self.transport.abortConnection()
        else:
            super().onMessage(payload, isBinary)

    @property
    def is_write_paused(self) -> bool:
        """Whether the client has left unread what fills Twisted's buffer (64 KiB). Twisted still
        pauses the HTTP channel that the WebSocket came from.
        """
        return bool(getattr(self.transport, "producerPaused", False))
