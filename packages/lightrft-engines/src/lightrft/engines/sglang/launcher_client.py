"""Asks a launcher of SGLang's servers, if there is one, for a server; see `lightrft.engines.sglang.launcher`."""

import array
import pickle
import socket
import struct
from collections.abc import Mapping, Sequence

VARIABLE = "LIGHTRFT_SGLANG_LAUNCHER"
"""The environment variable with the path of the launcher's socket."""
LENGTH = struct.Struct("!Q")
"""The format of the request's length, and of the answer."""


def launch(address: str, environment: Mapping[str, str], descriptors: Sequence[int], timeout: float) -> int:
    """Have a server forked.

    Args:
        address: The path of the launcher's socket.
        environment: The server's environment variables.
        descriptors: The server's connection, and the file for its output.
        timeout: Seconds to wait for the launcher, which first imports SGLang.

    Returns: The server's process id.

    Raises:
        ConnectionError: The launcher has ended, and starts no server.
        TimeoutError: It did not answer in time.
    """
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(timeout)
        client.connect(address)
        request = pickle.dumps(dict(environment))
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))
        client.sendmsg([LENGTH.pack(len(request))], [rights])
        client.sendall(request)
        return int(LENGTH.unpack(receive(client, LENGTH.size))[0])


def receive(source: socket.socket, size: int) -> bytes:
    """The next ``size`` bytes. Raises `ConnectionError` if the connection ends before."""
    data = b""
    while len(data) < size:
        part = source.recv(size - len(data))
        if not part:
            raise ConnectionError("the other side closed the connection")
        data += part
    return data
