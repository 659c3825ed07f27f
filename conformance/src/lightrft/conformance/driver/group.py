"""A group of worker processes, one a rank: started once, sent program after program, ended by their own ids.

A program has one deadline for the whole group. A rank that does not answer by then is hung: its stack is
taken, the group is killed and made anew by the next `run`. A rank that dies is noticed at once; the others
are given a moment to notice it too, then the group is killed.
"""

import contextlib
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal, Self

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from lightrft.conformance.driver import wire

STACK_SIGNAL = signal.SIGUSR1
TAIL_BYTES = 4000


@dataclass(frozen=True, kw_only=True)
class RankReport:
    """What became of one rank in one program."""

    state: Literal["answered", "hung", "died"]
    answer: dict[str, Any] = field(default_factory=dict)
    detail: str = ""
    """The stack of a hung rank; exit status and last output of a dead one."""


@dataclass(kw_only=True)
class _Worker:
    process: subprocess.Popen[bytes]
    connection: socket.socket
    output: IO[bytes]
    stacks: IO[bytes]

    def tail(self) -> str:
        """The last that the worker printed."""
        size = os.fstat(self.output.fileno()).st_size
        data = os.pread(self.output.fileno(), TAIL_BYTES, max(0, size - TAIL_BYTES))
        return data.decode(errors="replace").strip()

    def stack(self) -> str:
        """Where all its threads are now, by faulthandler."""
        before = os.fstat(self.stacks.fileno()).st_size
        os.kill(self.process.pid, STACK_SIGNAL)
        for _ in range(20):
            time.sleep(0.05)
            size = os.fstat(self.stacks.fileno()).st_size
            if size > before:
                time.sleep(0.05)
                break
        return os.pread(self.stacks.fileno(), 1 << 16, before).decode(errors="replace").strip()

    def kill(self) -> None:
        """End the worker and whatever it started in its session."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.connection.close()
        self.output.close()
        self.stacks.close()


class WorkerGroup:
    """``size`` worker processes. Without ``ranks`` (size 1) the worker has no rank in its environment."""

    def __init__(
        self,
        size: int,
        *,
        ranks: bool = True,
        start_seconds: float = 300.0,
        environment: Mapping[str, str] | None = None,
        worker: str = "lightrft.conformance.driver.worker",
    ) -> None:
        self.size, self._ranks, self._start_seconds = size, ranks, start_seconds
        self._environment = dict(environment or {})
        self._module = worker
        self._workers: list[_Worker] = []
        self._store: TCPStore | None = None
        self._number = 0
        self.restarts = 0
        """How often the group had to be made anew."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers there are, in rank order."""
        return [worker.process.pid for worker in self._workers]

    def run(self, command: Mapping[str, Any], seconds: float) -> list[RankReport]:
        """Send ``command`` to every rank and wait ``seconds`` for their answers."""
        if not self._workers:
            failures = self._start()
            if failures:
                return failures
        self._number += 1
        for worker in self._workers:
            try:
                wire.send(worker.connection, {**command, "number": self._number})
            except wire.ConnectionLost:  # it died between two programs; noticed below
                continue
        return self._collect(seconds)

    def close(self) -> None:
        """End all workers. May be called twice."""
        for worker in self._workers:
            worker.kill()
        self._workers = []
        self._store = None

    # Starting

    def _start(self) -> list[RankReport]:
        """Start the workers; returns reports only where one of them does not come up."""
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._workers = [self._spawn(rank) for rank in range(self.size)]
        self._number = 0
        reports = self._collect(self._start_seconds)
        return [] if all(report.state == "answered" for report in reports) else reports

    def _spawn(self, rank: int) -> _Worker:
        ours, theirs = socket.socketpair()
        output, stacks = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115 - closed by kill
        process = subprocess.Popen(
            [sys.executable, "-m", self._module],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=self._environment_of(rank, theirs.fileno(), stacks.fileno()),
            pass_fds=[theirs.fileno(), stacks.fileno()],
            start_new_session=True,
        )
        theirs.close()
        return _Worker(process=process, connection=ours, output=output, stacks=stacks)

    def _environment_of(self, rank: int, connection: int, stacks: int) -> dict[str, str]:
        places = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE")
        inherited = {name: value for name, value in os.environ.items() if name not in places}
        own = {
            "LIGHTRFT_CONFORMANCE_FDS": f"{connection},{stacks}",
            "LIGHTRFT_CONFORMANCE_RANK": str(rank),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(Path.cwd()), os.environ.get("PYTHONPATH", "")])),
        }
        if self._ranks:
            assert self._store is not None
            own |= {
                "RANK": str(rank),
                "WORLD_SIZE": str(self.size),
                "LOCAL_RANK": str(rank),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(self._store.port),
                "TORCHELASTIC_USE_AGENT_STORE": "True",
            }
        return {**inherited, **own, **self._environment}

    # Answers

    def _collect(self, seconds: float) -> list[RankReport]:
        """Every rank's answer to the last message; where one is missing, the group is killed."""
        end = time.monotonic() + seconds
        answers: dict[int, dict[str, Any]] = {}
        dead: set[int] = set()
        with selectors.DefaultSelector() as selector:
            for rank, worker in enumerate(self._workers):
                selector.register(worker.connection, selectors.EVENT_READ, rank)
            while len(answers) + len(dead) < self.size and time.monotonic() < end:
                for key, _ in selector.select(timeout=max(0.0, end - time.monotonic())):
                    rank = key.data
                    answer = self._receive(rank, end)
                    if answer is None:
                        dead.add(rank)
                        selector.unregister(key.fileobj)
                        end = min(end, time.monotonic() + 5.0)
                    elif answer.get("number") == self._number:
                        answers[rank] = answer
                    # an answer with another number belongs to a program that was given up; it is dropped
        reports = [self._report(rank, answers, dead) for rank in range(self.size)]
        if len(answers) < self.size:
            self.restarts += 1
            self.close()
        return reports

    def _receive(self, rank: int, end: float) -> dict[str, Any] | None:
        worker = self._workers[rank]
        worker.connection.settimeout(max(0.1, end - time.monotonic()))
        try:
            return wire.receive(worker.connection)
        except (wire.ConnectionLost, TimeoutError):
            return None

    def _report(self, rank: int, answers: Mapping[int, dict[str, Any]], dead: set[int]) -> RankReport:
        worker = self._workers[rank]
        if rank in answers:
            return RankReport(state="answered", answer=answers[rank])
        if rank in dead:
            try:
                status: int | None = worker.process.wait(timeout=1.0)
            except subprocess.TimeoutExpired:
                status = None
            return RankReport(state="died", detail=f"{_exit_words(status)}; its last words: {worker.tail() or 'none'}")
        return RankReport(state="hung", detail=worker.stack() if worker.process.poll() is None else worker.tail())


def _exit_words(status: int | None) -> str:
    if status is None:
        return "closed its connection"
    if status < 0:
        return f"killed by {signal.Signals(-status).name}"
    return f"exited with status {status}"
