"""Messages between the driver and a worker: length-prefixed JSON over a socket pair."""

import json
import socket
from typing import Any

Message = dict[str, Any]
"""A JSON object."""
_LENGTH = 8


class ConnectionLost(Exception):
    """The other side closed the connection or sent an invalid message."""


def send(connection: socket.socket, message: Message) -> None:
    """Send one message. Raises `ConnectionLost`."""
    body = json.dumps(dict(message)).encode()
    try:
        connection.sendall(len(body).to_bytes(_LENGTH) + body)
    except OSError as error:
        raise ConnectionLost(str(error)) from error


def receive(connection: socket.socket) -> Message:
    """Wait for one message. Raises `ConnectionLost`, or `TimeoutError` after the socket's timeout."""
    length = int.from_bytes(_exactly(connection, _LENGTH))
    try:
        message = json.loads(_exactly(connection, length))
    except ValueError as error:
        raise ConnectionLost(f"expected a JSON message: {error}") from error
    if not isinstance(message, dict):
        raise ConnectionLost(f"expected a JSON object, got {type(message).__name__}")
    return message


def _exactly(connection: socket.socket, count: int) -> bytes:
    parts = []
    while count:
        try:
            part = connection.recv(min(count, 1 << 20))
        except TimeoutError:
            raise
        except OSError as error:
            raise ConnectionLost(str(error)) from error
        if not part:
            raise ConnectionLost("the connection was closed")
        parts.append(part)
        count -= len(part)
    return b"".join(parts)
