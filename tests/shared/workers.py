"""A few processes, one a rank, that stay alive and run one function after the other.

They are plain spawned processes, with gloo on loopback. Each question has a deadline; a rank that misses it is
ended by its own process, and the whole group with it.
"""

import faulthandler
import gc
import multiprocessing
import os
import pickle
import socket
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

DEADLINE = 120.0
"""Seconds for one function on all ranks."""


class WorkersError(AssertionError):
    """A rank raised, ended, or did not answer in time."""


class Workers:
    """``size`` ranks."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._ranks: list[tuple[Any, Connection]] = []

    def run(self, function: Callable[..., Any], /, **arguments: Any) -> list[Any]:
        """Call ``function(**arguments)`` on every rank; its results by rank.

        A rank's exception is raised here, with its traceback as text; the ranks live on, if all have answered.
        """
        self._start()
        for _, connection in self._ranks:
            connection.send_bytes(pickle.dumps((function, arguments)))
        deadline = time.monotonic() + DEADLINE
        answers = [self._answer(rank, deadline) for rank in range(self.size)]
        failures = [f"rank {rank}:\n{answer}" for rank, (good, answer) in enumerate(answers) if not good]
        if any(good is None for good, _ in answers):
            self.stop()
        if failures:
            raise WorkersError("\n".join(failures))
        return [answer for _, answer in answers]

    def stop(self) -> None:
        """End all ranks."""
        for process, connection in self._ranks:
            process.kill()
            process.join()
            connection.close()
        self._ranks = []

    def _start(self) -> None:
        if self._ranks:
            return
        context = multiprocessing.get_context("spawn")
        port = _free_port()
        for rank in range(self.size):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, rank, self.size, port), daemon=True)
            process.start()
            there.close()
            self._ranks.append((process, here))

    def _answer(self, rank: int, deadline: float) -> tuple[bool | None, Any]:
        """Whether the function returned, and what, or else why; None where there is no answer."""
        _, connection = self._ranks[rank]
        try:
            if not connection.poll(max(0.0, deadline - time.monotonic())):
                return None, f"no answer within {DEADLINE:g} s"
            answer: tuple[bool, Any] = pickle.loads(connection.recv_bytes())
        except EOFError:
            return None, "the process ended"
        return answer


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def _serve(connection: Connection, rank: int, size: int, port: int) -> None:
    place = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(DEADLINE - 5, repeat=True, file=sys.stderr)
    while True:
        try:
            function, arguments = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        faulthandler.dump_traceback_later(DEADLINE - 5, repeat=True, file=sys.stderr)
        try:
            answer = True, function(**arguments)
        except BaseException:  # noqa: BLE001 - it is raised again in the test
            answer = False, traceback.format_exc()
        connection.send_bytes(pickle.dumps(answer))
        if not gc.get_freeze_count():
            gc.freeze()  # what was imported; closing a strategy collects garbage, and need not look at it each time
