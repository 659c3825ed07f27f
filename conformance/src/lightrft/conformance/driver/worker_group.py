"""A group of worker processes, one per rank: started once, sent program after program, ended by their own pids.

A program has one deadline for the whole group. A rank that misses it is hung: the driver records its stack and kills
the group, and the next `run` starts another. The driver immediately notices a rank that died, or whose answer says that
it gave up, gives the others `GRACE_SECONDS` to notice it too, then kills the group.
"""

import os
import selectors
import shutil
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Self

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from lightrft.conformance import scratch
from lightrft.conformance.driver import wire
from lightrft.conformance.driver.fork_server import PRELOADED, ForkServer
from lightrft.conformance.driver.worker_process import WorkerProcess

LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE")
"""The environment variables that a launcher sets for each rank."""
GRACE_SECONDS = 10.0
"""How long the other ranks may go on after one died or gave up."""


@dataclass(frozen=True, kw_only=True)
class RankReport:
    """What one rank did in one program."""

    state: Literal["answered", "hung", "died"]
    answer: wire.Message = field(default_factory=dict)
    detail: str = ""
    """The stack of a hung rank; the exit status and last output of a dead one."""
    killed: bool = False
    """Whether SIGKILL ended the rank: out of memory, or killed from outside."""


class WorkerGroup:
    """``size`` worker processes.

    Args:
        size: Number of ranks.
        ranks: Whether workers get a launcher's variables, such as ``RANK``. Without them, ``size`` must be 1.
        start_seconds: Deadline for starting all workers.
        environment: Variables to add to the workers' environment.
        worker: The module that each worker runs.
        preloaded: Modules to import once, before workers are forked.
        directory: Where programs write. Several groups may share one, and the caller removes it. By default the group
            has its own directory, which `close` removes.
        fork_servers: One per rank, with one directory, which becomes the group's own; `close` ends them. By default
            the group starts its own.
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
        directory: Path | None = None,
        fork_servers: Sequence[ForkServer] = (),
    ) -> None:
        self.size, self._ranks, self._start_seconds = size, ranks, start_seconds
        self._environment = dict(environment or {})
        self._module, self._preloaded = worker, preloaded
        self._fork_servers = list(fork_servers)
        self._owns_directory = directory is None
        self._directory = directory or (fork_servers[0].directory if fork_servers else scratch.choose())
        self._workers: list[WorkerProcess] = []
        self._store: TCPStore | None = None
        self._number = 0
        self.restarts = 0
        """How often the group was started again after a rank died or hung."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def pids(self) -> list[int]:
        """Process ids of the running workers, in rank order."""
        return [worker.process.pid for worker in self._workers]

    def run(
        self, command: wire.Message, seconds: float, gave_up: Callable[[wire.Message], bool] = lambda answer: False
    ) -> list[RankReport]:
        """Send ``command`` to every rank and wait for the answers.

        Starts the workers if none are running, or if one died since the last call.

        Args:
            command: The message to send.
            seconds: Deadline for all ranks; longer on an overloaded machine, see `load_factor`.
            gave_up: Whether an answer means that its rank did not reach the end, so that the others may wait for it.

        Returns:
            A report per rank, in rank order.
        """
        if any(worker.process.ended() for worker in self._workers):
            self.end_workers()
        if not self._workers:
            failures = self._start()
            if failures:
                return failures
        self._number += 1
        lost = {rank for rank, worker in enumerate(self._workers) if not self._sent(worker, command)}
        return self._collect(seconds, lost, gave_up)

    def _sent(self, worker: WorkerProcess, command: wire.Message) -> bool:
        try:
            worker.send({**command, "number": self._number})
        except wire.ConnectionLost:
            return False
        return True

    def close(self) -> None:
        """End all workers and fork servers. Idempotent."""
        self.end_workers()
        self._close_fork_servers()
        if self._owns_directory:
            shutil.rmtree(self._directory, ignore_errors=True)

    def _close_fork_servers(self) -> None:
        while self._fork_servers:
            self._fork_servers.pop().close()

    def end_workers(self) -> None:
        """End all workers; the next program starts others."""
        workers, self._workers, self._store = self._workers, [], None
        for worker in workers:
            worker.kill()

    # Starting

    def _start(self) -> list[RankReport]:
        """Start the workers; returns reports only if one of them does not start."""
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        shared = {**_environment(self._directory), **self._environment}
        if not self._fork_servers or any(fork_server.ended for fork_server in self._fork_servers):
            self._close_fork_servers()
            self._fork_servers += [
                ForkServer.launch(self._preloaded, shared, self._directory) for _ in range(self.size)
            ]
        try:
            for rank, fork_server in enumerate(self._fork_servers):
                environment = {**shared, **self._rank_environment(rank), **self._environment}
                self._workers.append(WorkerProcess.start(fork_server, self._module, environment))
        except wire.ConnectionLost as error:
            self.end_workers()
            self._close_fork_servers()
            return [RankReport(state="died", detail=f"could not be started: {error}")] * self.size
        self._number = 0
        reports = self._collect(self._start_seconds, set(), lambda answer: False)
        return [] if all(report.state == "answered" for report in reports) else reports

    def _rank_environment(self, rank: int) -> dict[str, str]:
        """The variables that differ between ranks."""
        variables = {"LIGHTRFT_CONFORMANCE_RANK": str(rank)}
        if self._ranks:
            assert self._store is not None
            values = (rank, self.size, rank, "127.0.0.1", self._store.port, True)
            variables |= dict(zip(LAUNCHER_VARIABLES, map(str, values), strict=True))
        return variables

    # Answers

    def _collect(self, seconds: float, lost: set[int], gave_up: Callable[[wire.Message], bool]) -> list[RankReport]:
        """Every rank's answer to the last message; kills the group if one is missing."""
        answers: dict[int, wire.Message] = {}
        with selectors.DefaultSelector() as selector:
            for rank, worker in enumerate(self._workers):
                selector.register(worker.output, selectors.EVENT_READ, (rank, "output"))
                if rank not in lost:
                    selector.register(worker.connection, selectors.EVENT_READ, (rank, "connection"))
            end = time.monotonic() + seconds * load_factor()
            dead = self._listen(selector, end, answers, lost, gave_up)
        reports = [self._report(rank, answers, dead) for rank in range(self.size)]
        if len(answers) < self.size:
            self.restarts += 1
            self.end_workers()
        return reports

    def _listen(
        self, selector: selectors.BaseSelector, end: float, answers: dict[int, wire.Message], dead: set[int],
        gave_up: Callable[[wire.Message], bool],
    ) -> set[int]:  # fmt: skip
        """Fill ``answers`` until every rank has answered or died, or until ``end``; returns the ranks that died.

        It polls once more at the end, because waiting for the rest of one message may have delayed reading others.
        """
        if dead:
            end = min(end, _end_of_grace())
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
                    end = min(end, _end_of_grace())
                    continue
                if answer.get("number") == self._number:
                    answers[rank] = answer
                    end = min(end, _end_of_grace()) if gave_up(answer) else end
                # an answer with another number belongs to an abandoned program: drop it
        return dead

    def _report(self, rank: int, answers: Mapping[int, wire.Message], dead: set[int]) -> RankReport:
        if rank in answers:
            return RankReport(state="answered", answer=answers[rank])
        worker = self._workers[rank]
        if rank in dead or worker.process.ended():
            detail = worker.describe_exit()
            return RankReport(state="died", detail=detail, killed=worker.process.status() == -signal.SIGKILL)
        return RankReport(state="hung", detail=worker.stack())


def launch_fork_server(preloaded: Sequence[str]) -> ForkServer:
    """Start a fork server to copy for groups without an environment of their own. It starts no workers."""
    directory = scratch.choose()
    return ForkServer.launch(preloaded, _environment(directory), directory)


def _environment(directory: Path) -> dict[str, str]:
    """The environment of a fork server, and what the environments of all its workers have in common."""
    inherited = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
    changes = {
        scratch.VARIABLE: str(directory),
        "OMP_NUM_THREADS": "1",
        "MALLOC_MMAP_THRESHOLD_": str(2 << 20),  # return large blocks when freed, so that peaks can be measured
        "PYTHONPATH": os.pathsep.join(filter(None, [str(Path.cwd()), os.environ.get("PYTHONPATH", "")])),
    }
    return {**inherited, **changes}


def _end_of_grace() -> float:
    return time.monotonic() + GRACE_SECONDS * load_factor()


def load_factor() -> float:
    """By how much to stretch deadlines: the load average per core, between 1 and 4."""
    waiting = os.getloadavg()[0] / len(os.sched_getaffinity(0))
    return min(4.0, max(1.0, waiting))
