"""A few processes, one per rank, that stay alive and run one function after the other.

They are plain processes, with gloo on loopback, forked from one that has imported torch without using it.
Each question has a deadline. Ranks that miss it print their stacks, and are ended with the whole group and everything that
they started.
"""

import faulthandler
import gc
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

import pytest

DEADLINE = 120.0
"""Seconds for one function on all ranks, if the caller gives no others."""
START = 300.0
"""Seconds within which all ranks must have started and imported torch."""


PRELOADED = ["torch", "torch._dynamo", "lightrft.strategy"]
"""Imported once, in a process from which the ranks are forked."""


class WorkersError(AssertionError):
    """A rank raised, ended, or did not answer in time."""


class Workers:
    """``size`` ranks."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._ranks: list[tuple[Any, Connection]] = []

    def run(self, function: Callable[..., Any], /, *, deadline: float = DEADLINE, **arguments: Any) -> list[Any]:
        """Call ``function(**arguments)`` on every rank; its results by rank.

        A rank's exception is raised here, with its traceback as text; the ranks stay alive if all have answered.
        """
        if not self._ranks:
            self._start()
            self._ask(gc.collect, {}, START)
        return self._ask(function, arguments, deadline)

    def stop(self) -> None:
        """End all ranks, and what they started."""
        for process, connection in self._ranks:
            with suppress(ProcessLookupError):  # it has just started, or has ended
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.join()
            connection.close()
        self._ranks = []

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        port = _free_port()
        for rank in range(self.size):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, rank, self.size, port), daemon=True)
            process.start()
            there.close()
            self._ranks.append((process, here))

    def _ask(self, function: Callable[..., Any], arguments: dict[str, Any], seconds: float) -> list[Any]:
        for _, connection in self._ranks:
            connection.send_bytes(pickle.dumps((function, arguments, seconds)))
        deadline = time.monotonic() + seconds
        answers = [self._answer(rank, deadline) for rank in range(self.size)]
        if any(good is None for good, _ in answers):
            self.stop()
        failures = [f"rank {rank}:\n{answer}" for rank, (good, answer) in enumerate(answers) if not good]
        if failures:
            raise WorkersError("\n".join(failures))
        return [answer for _, answer in answers]

    def _answer(self, rank: int, deadline: float) -> tuple[bool | None, Any]:
        """Whether the function returned, and its result or its error; None if there is no answer."""
        _, connection = self._ranks[rank]
        try:
            if not connection.poll(max(0.0, deadline - time.monotonic())):
                return None, "no answer in time; its stack is on stderr"
            answer: tuple[bool, Any] = pickle.loads(connection.recv_bytes())
        except EOFError:
            return None, "the process ended"
        return answer


def started(size: int) -> Iterator[Workers]:
    """For a fixture: ``size`` ranks, ended when it is torn down."""
    workers = Workers(size)
    yield workers
    workers.stop()


@pytest.fixture(scope="session")
def one() -> Iterator[Workers]:
    """A world of one rank."""
    yield from started(1)


@pytest.fixture(scope="session")
def two() -> Iterator[Workers]:
    """A world of two ranks."""
    yield from started(2)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def _serve(connection: Connection, rank: int, size: int, port: int) -> None:
    os.setpgid(0, 0)  # what this rank starts, compilers for example, ends with it
    variables = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in variables.items()})
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            function, arguments, seconds = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        connection.send_bytes(pickle.dumps(_outcome(function, arguments, seconds)))
        if not gc.get_freeze_count():
            gc.freeze()  # what was imported; closing a strategy collects garbage, and need not look at it each time


def _outcome(function: Callable[..., Any], arguments: dict[str, Any], seconds: float) -> tuple[bool, Any]:
    """Whether the function returned, and what, or its traceback. Shows its stack just before time is up."""
    faulthandler.dump_traceback_later(seconds - min(5.0, seconds / 2), file=sys.stderr)
    signal.alarm(int(seconds) + 30)  # ends this process, should the one that asks be gone
    try:
        return True, function(**arguments)
    except BaseException:  # noqa: BLE001 - it is raised again in the test
        return False, traceback.format_exc()
    finally:
        signal.alarm(0)
        faulthandler.cancel_dump_traceback_later()
