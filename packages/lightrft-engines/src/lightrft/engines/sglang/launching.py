"""How a process asks a launcher, where there is one, for a server: see `lightrft.engines.sglang.launcher`."""

import array
import pickle
import socket
import struct
from collections.abc import Mapping, Sequence

VARIABLE = "LIGHTRFT_SGLANG_LAUNCHER"
"""Where its socket is."""
LENGTH = struct.Struct("!Q")
"""Of the request that follows, and the answer."""


def launch(address: str, environment: Mapping[str, str], descriptors: Sequence[int]) -> int:
    """Have a server forked, with these variables; ``descriptors``: its connection, and where it writes. Its process id."""
    with socket.socket(socket.AF_UNIX) as asking:
        asking.connect(address)
        request = pickle.dumps(dict(environment))
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))
        asking.sendmsg([LENGTH.pack(len(request))], [rights])
        asking.sendall(request)
        return int(LENGTH.unpack(received(asking, LENGTH.size))[0])


def received(source: socket.socket, size: int) -> bytes:
    """The next ``size`` bytes."""
    found = b""
    while len(found) < size:
        part = source.recv(size - len(found))
        if not part:
            raise ConnectionError("the launcher of SGLang's servers hung up; see its own output")
        found += part
    return found
