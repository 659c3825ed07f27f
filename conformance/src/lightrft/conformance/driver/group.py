"""A group of worker processes, one a rank: started once, sent program after program, ended by their own ids.

A program has one deadline for the whole group. A rank that does not answer by then is hung: its stack is
taken, the group is killed and made anew by the next `run`. A rank that dies is noticed at once; the others
are given a moment to notice it too, then the group is killed.
"""

import contextlib
import os
import selectors
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from lightrft.conformance.driver import guardian, scratch, wire
from lightrft.conformance.driver.nursery import PRELOADED, Nursery
from lightrft.conformance.driver.watched import Worker

PLACES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE")
"""What a launcher tells each rank."""
MOURNING_SECONDS = 10.0
"""How long the others may go on after a rank died."""


@dataclass(frozen=True, kw_only=True)
class RankReport:
    """What became of one rank in one program."""

    state: Literal["answered", "hung", "died"]
    answer: dict[str, Any] = field(default_factory=dict)
    detail: str = ""
    """The stack of a hung rank; exit status and last output of a dead one."""
    killed: bool = False
    """By SIGKILL, which nobody sends to itself: memory that ran out, or somebody outside."""


class WorkerGroup:
    """``size`` worker processes. Without ``ranks`` (size 1) the worker has no rank in its environment.

    Programs write below ``place``, which several groups may share and whose owner removes it; without it, below a
    directory of the group's own, which is gone when the group is closed.
    """

    def __init__(
        self,
        size: int,
        *,
        ranks: bool = True,
        start_seconds: float = 120.0,
        environment: Mapping[str, str] | None = None,
        worker: str = "lightrft.conformance.driver.worker",
        preloaded: Sequence[str] = PRELOADED,
        place: Path | None = None,
    ) -> None:
        self.size, self._ranks, self._start_seconds = size, ranks, start_seconds
        self._environment = dict(environment or {})
        self._module, self._preloaded = worker, preloaded
        self._nurseries: list[Nursery] = []
        self._scratch, self._owns_scratch = place or scratch.choose(), place is None
        self._workers: list[Worker] = []
        self._guardian: subprocess.Popen[bytes] | None = None
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
        """Send ``command`` to every rank and wait ``seconds`` for their answers, longer on a machine that is overloaded.

        A rank that died while nothing was asked of it is no answer to ``command``: the group is made anew first.
        """
        if any(worker.process.ended() for worker in self._workers):
            self.end_workers()
        if not self._workers:
            failures = self._start()
            if failures:
                return failures
        self._number += 1
        lost = {rank for rank, worker in enumerate(self._workers) if not self._sent(worker, command)}
        return self._collect(seconds, lost)

    def _sent(self, worker: Worker, command: Mapping[str, Any]) -> bool:
        try:
            worker.send({**command, "number": self._number})
        except wire.ConnectionLost:
            return False
        return True

    def close(self) -> None:
        """End all workers, and what starts them. May be called twice."""
        self.end_workers()
        self._close_nurseries()
        if self._owns_scratch:
            shutil.rmtree(self._scratch, ignore_errors=True)
        if self._guardian is not None:
            assert self._guardian.stdin is not None
            self._tell_guardian(".\n")
            with contextlib.suppress(BrokenPipeError):
                self._guardian.stdin.close()
            self._guardian.wait()
            self._guardian = None

    def _close_nurseries(self) -> None:
        while self._nurseries:
            self._nurseries.pop().close()

    def end_workers(self) -> None:
        """End all workers; the next program is run by others."""
        workers, self._workers, self._store = self._workers, [], None
        for worker in workers:
            worker.kill()
            self._tell_guardian(f"-{worker.process.pid}\n")

    # Starting

    def _start(self) -> list[RankReport]:
        """Start the workers; returns reports only where one of them does not come up."""
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        shared = self._shared_environment()
        if not self._nurseries or any(nursery.ended for nursery in self._nurseries):
            self._close_nurseries()
            self._nurseries += [Nursery(self._preloaded, shared) for _ in range(self.size)]
        try:
            for rank, nursery in enumerate(self._nurseries):
                environment = {**shared, **self._place_of(rank), **self._environment}
                self._workers.append(Worker.start(nursery, self._module, environment))
                self._tell_guardian(f"+{self._workers[rank].process.pid}\n")
        except wire.ConnectionLost as error:
            self.end_workers()
            self._close_nurseries()
            return [RankReport(state="died", detail=f"could not be started: {error}")] * self.size
        self._number = 0
        reports = self._collect(self._start_seconds, set())
        return [] if all(report.state == "answered" for report in reports) else reports

    def _tell_guardian(self, line: str) -> None:
        if self._guardian is None:
            self._guardian = subprocess.Popen(
                [sys.executable, "-I", "-S", guardian.__file__, self._scratch],
                stdin=subprocess.PIPE,
                start_new_session=True,
            )
        assert self._guardian.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # somebody ended it; this driver ends its workers all the same
            self._guardian.stdin.write(line.encode())
            self._guardian.stdin.flush()

    def _shared_environment(self) -> dict[str, str]:
        inherited = {name: value for name, value in os.environ.items() if name not in PLACES}
        own = {
            scratch.VARIABLE: str(self._scratch),
            "OMP_NUM_THREADS": "1",
            "MALLOC_MMAP_THRESHOLD_": str(2 << 20),  # large tensors go back when freed, so that peaks can be measured
            "PYTHONPATH": os.pathsep.join(filter(None, [str(Path.cwd()), os.environ.get("PYTHONPATH", "")])),
        }
        return {**inherited, **own, **self._environment}

    def _place_of(self, rank: int) -> dict[str, str]:
        """What the environment of one rank has beside."""
        own = {"LIGHTRFT_CONFORMANCE_RANK": str(rank)}
        if self._ranks:
            assert self._store is not None
            values = (rank, self.size, rank, "127.0.0.1", self._store.port, True)
            own |= dict(zip(PLACES, map(str, values), strict=True))
        return own

    # Answers

    def _collect(self, seconds: float, lost: set[int]) -> list[RankReport]:
        """Every rank's answer to the last message; where one is missing, the group is killed."""
        answers: dict[int, dict[str, Any]] = {}
        with selectors.DefaultSelector() as selector:
            for rank, worker in enumerate(self._workers):
                selector.register(worker.output, selectors.EVENT_READ, (rank, "output"))
                if rank not in lost:
                    selector.register(worker.connection, selectors.EVENT_READ, (rank, "connection"))
            dead = self._listen(selector, time.monotonic() + seconds * crowding(), answers, lost)
        reports = [self._report(rank, answers, dead) for rank in range(self.size)]
        if len(answers) < self.size:
            self.restarts += 1
            self.end_workers()
        return reports

    def _listen(
        self, selector: selectors.BaseSelector, end: float, answers: dict[int, dict[str, Any]], dead: set[int]
    ) -> set[int]:
        """Fill ``answers`` until all have answered or died, or it is ``end``; returns the ranks that died.

        At the end it looks once more: half a message of one rank may have kept it from the answers of others.
        """
        if dead:
            end = min(end, time.monotonic() + MOURNING_SECONDS * crowding())
        time_is_up = False
        while len(answers.keys() | dead) < self.size and not time_is_up:
            time_is_up = time.monotonic() >= end
            for key, _ in selector.select(timeout=max(0.0, end - time.monotonic())):
                rank, what = key.data
                if what == "output":
                    if not self._workers[rank].read_output():
                        selector.unregister(key.fileobj)
                    continue
                try:
                    answer = self._workers[rank].receive(end - time.monotonic())
                except wire.ConnectionLost:
                    dead.add(rank)
                    selector.unregister(key.fileobj)
                    end = min(end, time.monotonic() + MOURNING_SECONDS * crowding())
                    continue
                if answer.get("number") == self._number:
                    answers[rank] = answer
                # an answer with another number belongs to a program that was given up; it is dropped
        return dead

    def _report(self, rank: int, answers: Mapping[int, dict[str, Any]], dead: set[int]) -> RankReport:
        if rank in answers:
            return RankReport(state="answered", answer=answers[rank])
        worker = self._workers[rank]
        if rank in dead or worker.process.ended():
            detail = worker.exit_words()
            return RankReport(state="died", detail=detail, killed=worker.process.status() == -signal.SIGKILL)
        return RankReport(state="hung", detail=worker.stack())


def crowding() -> float:
    """By how much a deadline is to be stretched: processes that want a core, over cores, within 1 and 4."""
    waiting = os.getloadavg()[0] / len(os.sched_getaffinity(0))
    return min(4.0, max(1.0, waiting))
