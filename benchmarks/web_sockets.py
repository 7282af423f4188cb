"""Clients of the live socket that use little CPU: 500 of them share two cores with the server."""

from __future__ import annotations

import base64
import json
import os
import selectors
import socket
import struct
from typing import Any

TEXT_FRAME, CLOSE_FRAME, PING_FRAME, PONG_FRAME = 1, 8, 9, 10


def open_socket(port: int, session: str, buffer_bytes: int = 0) -> socket.socket:
    """A socket of `/ws/live` with the session of a user, after the handshake (RFC 6455, 4.1)."""
    connection = socket.create_connection(("127.0.0.1", port), timeout=30)
    if buffer_bytes:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
    key = base64.b64encode(os.urandom(16)).decode()
    head = (
        f"GET /ws/live HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUpgrade: websocket\r\n"
        f"Connection: Upgrade\r\nSec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n"
        f"Origin: http://127.0.0.1:{port}\r\nCookie: snapml_session={session}\r\n\r\n"
    )
    connection.sendall(head.encode())
    answer = b""
    while not answer.endswith(b"\r\n\r\n"):
        answer += connection.recv(1)
    assert answer.startswith(b"HTTP/1.1 101"), f"the socket was refused: {answer!r}"
    return connection


def send_message(connection: socket.socket, message: dict[str, Any]) -> None:
    send_frame(connection, TEXT_FRAME, json.dumps(message).encode())


def send_frame(connection: socket.socket, opcode: int, payload: bytes) -> None:
    """Send a masked frame (RFC 6455, 5.2) of at most 125 bytes."""
    mask = os.urandom(4)
    masked = bytes(byte ^ mask[index % 4] for index, byte in enumerate(payload))
    connection.sendall(struct.pack("!BB", 0x80 | opcode, 0x80 | len(payload)) + mask + masked)


class LiveClient:
    """Follows one run: acknowledges each frame and checks that no event is missing."""

    def __init__(self, port: int, session: str, run: int) -> None:
        self.connection, self.run = open_socket(port, session), run
        self.unread, self.last_seq, self.frames = bytearray(), -1, 0
        send_message(self.connection, {"type": "sub", "run": run, "cursor": 0, "points": 1000})

    def read_frames(self) -> None:
        """Handle what has arrived. Raises AssertionError if the server has closed the socket or an
        event is missing.
        """
        data = self.connection.recv(2**16)
        assert data, "the server has closed a socket"
        self.unread += data
        while (frame := self.take_frame()) is not None:
            opcode, payload = frame
            assert opcode != CLOSE_FRAME, f"the server has closed a socket: {payload!r}"
            if opcode == PING_FRAME:  # without an answer the server ends the connection
                send_frame(self.connection, PONG_FRAME, payload)
            if opcode == TEXT_FRAME:
                self.handle_message(json.loads(payload))

    def take_frame(self) -> tuple[int, bytes] | None:
        """Opcode and payload of the next complete frame."""
        if len(self.unread) < 2:
            return None
        size, start = self.unread[1], 2
        if size >= 126:
            start = 4 if size == 126 else 10
            if len(self.unread) < start:
                return None
            size = int.from_bytes(self.unread[2:start], "big")
        if len(self.unread) < start + size:
            return None
        opcode, payload = self.unread[0] & 15, bytes(self.unread[start : start + size])
        del self.unread[: start + size]
        return opcode, payload

    def handle_message(self, message: dict[str, Any]) -> None:
        if message["type"] == "delta":
            seqs = [event["seq"] for event in message["events"]]
            expected = list(range(self.last_seq + 1, message["last"] + 1))
            assert seqs == expected, f"expected {expected}, got {seqs}"
        self.last_seq = message["upto"] if message["type"] == "snap" else message["last"]
        self.frames += 1
        send_message(self.connection, {"type": "ack", "run": self.run, "seq": self.last_seq})


def follow_run(port: int, sessions: list[str], run: int, last_seq: int) -> dict[str, Any]:
    """Follow a run with one socket per session until each has event `last_seq`."""
    clients = []
    with selectors.DefaultSelector() as selector:
        for session in sessions:
            client = LiveClient(port, session, run)
            clients.append(client)
            selector.register(client.connection, selectors.EVENT_READ, client)
            for key, _ in selector.select(timeout=0):
                key.data.read_frames()  # a frame must be acknowledged within 30 s
        print("ready", flush=True)
        while any(client.last_seq < last_seq for client in clients):
            ready = selector.select(timeout=60)
            assert ready, "no frame in 60 s"
            for key, _ in ready:
                key.data.read_frames()
    frames = [client.frames for client in clients]
    return {"sockets": len(clients), "frames": sum(frames), "least_frames": min(frames)}
