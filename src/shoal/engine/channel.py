"""One TCP connection between the driver of an engine and a rank: frames of bytes, and how it began.

A frame is its length (4 bytes, big endian) and so many bytes. Both sides prove that they know the engine's secret
before anything else is read: HMAC-SHA256 over a nonce of each side, the rank first. What follows is not encrypted.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import select
import socket
import struct
import threading
import time

_LENGTH = struct.Struct(">I")
MAX_FRAME = 1 << 28
MAX_STRANGERS_FRAME = 4096
"""Of a peer that has not proved itself."""
SEND_SECONDS = 2
"""After which a peer that takes nothing in is taken for dead."""


class ChannelClosed(Exception):
    """The other side is gone, or does not keep to the protocol."""


class Channel:
    """Any thread may send; one thread receives."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(True)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", SEND_SECONDS, 0))
        self._connection = connection
        self._sending = threading.Lock()
        self._buffer = bytearray()
        self._poll = select.poll()
        self._poll.register(connection, select.POLLIN)
        self.max_frame = MAX_STRANGERS_FRAME

    def fileno(self) -> int:
        return self._connection.fileno()

    @property
    def local_address(self) -> str:
        """Of the interface that reaches the other side."""
        address: str = self._connection.getsockname()[0]
        return address

    def send(self, message: bytes) -> None:
        """Raises ChannelClosed."""
        try:
            with self._sending:
                self._connection.sendall(_LENGTH.pack(len(message)) + message)
        except OSError as error:
            raise ChannelClosed(str(error)) from None

    def receive(self, timeout: float | None = None) -> bytes | None:
        """The next message; None after `timeout` seconds. Raises ChannelClosed."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while (message := self._take()) is None:
            wait = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not self._poll.poll(None if wait is None else wait * 1000):
                return None
            self._fill()
        return message

    def received(self) -> list[bytes]:
        """All messages of a connection that is readable. Raises ChannelClosed if it ended and nothing whole is left."""
        try:
            self._fill()
        except ChannelClosed:
            messages = self._take_all()
            if messages:
                return messages
            raise
        return self._take_all()

    def close(self) -> None:
        self._connection.close()

    def _fill(self) -> None:
        try:
            received = self._connection.recv(1 << 18)
        except OSError as error:
            raise ChannelClosed(str(error)) from None
        if not received:
            raise ChannelClosed("the connection was closed")
        self._buffer += received

    def _take(self) -> bytes | None:
        if len(self._buffer) < _LENGTH.size:
            return None
        (length,) = _LENGTH.unpack_from(self._buffer)
        if length > self.max_frame:
            raise ChannelClosed(f"a message of {length} bytes was announced, the limit is {self.max_frame}")
        end = _LENGTH.size + length
        if len(self._buffer) < end:
            return None
        message = bytes(self._buffer[_LENGTH.size : end])
        del self._buffer[:end]
        return message

    def _take_all(self) -> list[bytes]:
        messages = []
        while (message := self._take()) is not None:
            messages.append(message)
        return messages


def new_nonce() -> bytes:
    return secrets.token_bytes(32)


def proof(secret: bytes, role: str, *parts: bytes) -> bytes:
    """That the sender knows the secret, bound to what it says. Parts are of fixed length or come last."""
    return hmac.new(secret, role.encode() + b"\0" + b"".join(parts), hashlib.sha256).digest()


def is_proof(given: bytes, expected: bytes) -> bool:
    return hmac.compare_digest(given, expected)
