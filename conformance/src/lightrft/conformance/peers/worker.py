"""One rank: runs one program on a target, and answers with what it returned, or with why it did not.

The programs are module-level functions of `lightrft.conformance.peers.promises`. Their first argument is this `Rank`.
"""

import faulthandler
import importlib
import os
import random
import socket
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lightrft.conformance import scratch
from lightrft.conformance.driver import wire
from lightrft.conformance.driver.worker_process import STACK_SIGNAL
from lightrft.conformance.peers.protocol import LoopSettings, NotOffered, Target, TrainingLoop
from lightrft.conformance.values import Record, decode, encode, error_record


@dataclass(frozen=True, kw_only=True)
class Rank:
    """What a program may use."""

    target: Target
    number: int
    world: int
    folder: Path
    """Shared by all ranks and runs of a promise; it exists."""

    @contextmanager
    def may_refuse(self) -> Iterator[None]:
        """Where a program runs what the library may refuse; `Outcome.refused` says that it did so here."""
        try:
            yield
        except BaseException as error:  # torch.distributed.checkpoint.CheckpointException is not an Exception
            _refusals.append(error)
            raise

    def loop(self, **settings: Any) -> TrainingLoop:
        """A new loop of the target, with `LoopSettings`."""
        _loops.append(self.target(LoopSettings(**settings)))
        return _loops[-1]


_refusals: list[BaseException] = []
_loops: list[TrainingLoop] = []
"""Never freed: freeing DistributedDataParallel after its process group was left joins a thread of gloo that may wait
for the interpreter forever."""


def resolve(name: str) -> Any:
    """What ``module:attribute`` names."""
    module, _, attribute = name.partition(":")
    value: Any = importlib.import_module(module)
    for part in attribute.split("."):
        value = getattr(value, part)
    return value


def main() -> None:
    """Run one program, answer, and wait for the driver to end this process."""
    connection_fd, stacks_fd = map(int, os.environ.pop("LIGHTRFT_CONFORMANCE_FDS").split(","))
    faulthandler.register(STACK_SIGNAL, file=stacks_fd, all_threads=True)
    connection = socket.socket(fileno=connection_fd)
    connection.set_inheritable(False)
    number = int(os.environ.pop("LIGHTRFT_CONFORMANCE_RANK"))
    wire.send(connection, {"number": 0})
    torch.set_num_threads(1)
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    while True:
        try:
            command = wire.receive(connection)
        except wire.ConnectionLost:
            os._exit(0)
        answer = {"number": command["number"], **_answer(command, number)}
        sys.stdout.flush()
        sys.stderr.flush()
        wire.send(connection, answer)


def _answer(command: Record, number: int) -> Record:
    try:
        program: Callable[..., object] = resolve(command["program"])
        folder = scratch.scratch("peers")
        rank = Rank(target=resolve(command["target"]), number=number, world=command["world"], folder=folder)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return {"result": encode(program(rank, **decode(command["arguments"])))}
    except NotOffered as missing:
        return {"not_offered": [missing.what, missing.link]}
    except BaseException as error:  # noqa: BLE001 - any error of the code under test is an answer
        traceback.print_exc()
        return {"error": error_record(error), "refused": any(error is refusal for refusal in _refusals)}


if __name__ == "__main__":
    main()
