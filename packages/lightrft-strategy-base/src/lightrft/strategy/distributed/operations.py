"""The public call in progress, so that a rank that waits for one that died reports in which call it waited.

torch reports a rank that died as a transport error deep inside a collective. Every public method of a strategy runs inside
`Operations.running(name)`, which turns such an error into a `StrategyError` with that name.
"""

import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
import torch.distributed as dist

from lightrft.config import StrategyError
from lightrft.strategy.telemetry.phases import PhaseTimer

_GLOO = re.compile(
    r"\[[^\]]*/gloo/gloo/[^\]]*:\d+\] |Gloo connectFullMesh failed with |Application timeout caused pair closure"
)
"""The start of gloo's messages; torch raises its errors as plain ``RuntimeError``."""


def is_lost_peer(error: BaseException) -> bool:
    """Return whether ``error`` means that another rank did not answer: a timeout, or a closed connection."""
    if isinstance(error, dist.DistError):
        return True
    return type(error) is RuntimeError and _GLOO.match(str(error)) is not None


class Operations:
    """The outermost public call in progress, and the translation of transport errors in it."""

    def __init__(self, rank: int, size: int, timeout: float) -> None:
        self.rank, self.size, self.timeout = rank, size, timeout
        self.current: str | None = None
        self.since = 0.0
        self.timer: PhaseTimer | None = None
        """Measures the outermost calls, for `log`."""

    @contextmanager
    def running(self, name: str) -> Iterator[None]:
        """Run the body as the call ``name``; nested calls keep the outermost name.

        Under ``torch.inference_mode``, calls other than a forward pass run under ``torch.no_grad``: weights and
        optimizer state that they create must train later. Inside ``init_model_context(meta_init=True)``, they run with
        the CPU as default device: what they send to other ranks has values.

        Raises:
            StrategyError: A peer was lost; the message has that name. Other errors pass unchanged.
        """
        if self.current is not None:
            yield
            return
        began = None if self.timer is None else self.timer.begin(name)
        self.current, self.since = name, time.monotonic()
        try:
            with ExitStack() as modes:
                if name != "forward":
                    _enter_modes(modes)
                yield
        except RuntimeError as error:
            if not is_lost_peer(error):
                raise
            raise StrategyError(self.lost_peer(name)) from error
        finally:
            self.current = None
            if began is not None and self.timer is not None:
                self.timer.end(began)

    def lost_peer(self, name: str) -> str:
        """Return the message for a rank that lost a peer in the call ``name``."""
        return (
            f"{name}: rank {self.rank} of {self.size} waited for another rank, which ended or did not make the "
            f"same call within {self.timeout:g} s. See the first error on the other ranks. Every rank must make "
            f"this call, in the same order. This process group can no longer be used."
        )


def _enter_modes(modes: ExitStack) -> None:
    """Leave modes of the caller in which a public call would create tensors that cannot train or have no values."""
    if torch.is_inference_mode_enabled():
        modes.enter_context(torch.inference_mode(False))
        modes.enter_context(torch.no_grad())
    if torch.get_default_device().type == "meta":
        modes.enter_context(torch.device("cpu"))


class TimeoutReporter:
    """A thread that writes the call in progress to stderr shortly before its timeout.

    NCCL's watchdog ends the process at the timeout, so no exception can be raised there. gloo raises, and needs none.
    """

    def __init__(self, operations: Operations) -> None:
        self._operations = operations
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lightrft-timeout-reporter", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        limit = 0.9 * self._operations.timeout
        reported = 0.0
        while not self._stop.wait(min(1.0, limit / 10)):
            name, since = self._operations.current, self._operations.since
            if name is not None and since != reported and time.monotonic() - since > limit:
                reported = since
                # Not through the logger, which is silent on ranks other than 0: any rank may be the one that waits.
                print(f"lightrft: {self._operations.lost_peer(name)}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """End the thread. May be called twice."""
        self._stop.set()
        self._thread.join()
