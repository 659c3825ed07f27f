"""Naming what a process is doing, so that a rank which waits in vain says in which call it waited.

torch reports a lost peer as a transport error deep inside a collective. Every public method of a strategy
runs inside `Operations.running(its name)`, which turns such an error into a `StrategyError` under that name.
"""

import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from lightrft.config import StrategyError

_GLOO = re.compile(
    r"\[[^\]]*/gloo/gloo/[^\]]*:\d+\] |Gloo connectFullMesh failed with |Application timeout caused pair closure"
)
"""How the messages begin of gloo, whose errors torch raises as plain ``RuntimeError``."""


def is_lost_peer(error: BaseException) -> bool:
    """Whether ``error`` says that another rank did not answer: a timeout, or a closed connection."""
    if isinstance(error, dist.DistError):
        return True
    return type(error) is RuntimeError and _GLOO.match(str(error)) is not None


class Operations:
    """The name of the outermost public call in progress, and the translation of what goes wrong in it."""

    def __init__(self, rank: int, size: int, timeout: float) -> None:
        self.rank, self.size, self.timeout = rank, size, timeout
        self.current: str | None = None
        self.since = 0.0

    @contextmanager
    def running(self, name: str) -> Iterator[None]:
        """Do the body under ``name``; nested calls keep the outermost name.

        Raises `StrategyError` with that name where the body met a lost peer; other errors pass.
        """
        if self.current is not None:
            yield
            return
        self.current, self.since = name, time.monotonic()
        try:
            yield
        except RuntimeError as error:
            if not is_lost_peer(error):
                raise
            raise StrategyError(self.lost_peer(name)) from error
        finally:
            self.current = None

    def lost_peer(self, name: str) -> str:
        """The message for a rank that waited in vain in ``name``."""
        return (
            f"{name}: rank {self.rank} of {self.size} waited for another rank, which ended or did not make the "
            f"same call within {self.timeout:g} s. See the first error on the other ranks; every rank must make "
            f"this call, in the same order. This process group cannot be used any more."
        )


class Watch:
    """A thread that writes the operation in progress to stderr shortly before its time is up.

    NCCL's watchdog ends the process at the timeout, so that no exception can be raised there; gloo raises,
    and needs no watch.
    """

    def __init__(self, operations: Operations) -> None:
        self._operations = operations
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lightrft-watch", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        limit = 0.9 * self._operations.timeout
        reported = 0.0
        while not self._stop.wait(min(1.0, limit / 10)):
            name, since = self._operations.current, self._operations.since
            if name is not None and since != reported and time.monotonic() - since > limit:
                reported = since
                # The logger speaks on rank 0 only, and this must be heard from whichever rank waits.
                print(f"lightrft: {self._operations.lost_peer(name)}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """End the thread. May be called twice."""
        self._stop.set()
        self._thread.join()
