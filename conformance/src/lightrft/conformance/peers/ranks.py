"""The ranks of a target, from the driver: every run of a program has new processes, a deadline, and its own store."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from lightrft.conformance import scratch
from lightrft.conformance.clause import show_error
from lightrft.conformance.driver.worker_group import RankReport, WorkerGroup
from lightrft.conformance.peers.protocol import NotOffered
from lightrft.conformance.values import Record, decode, encode

START_SECONDS = 120.0
RUN_SECONDS = 60.0
FIRST_SECONDS = 300.0
"""Added to the deadline of the first run: a library may compile operators when it is first used."""


class Differs(Exception):
    """The target does something other than what was promised; the message says what was expected and what it did."""


class NotJudged(Exception):
    """What the promise is about did not happen, so that there is nothing to judge; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a program did on one rank."""

    result: Any = None
    """What the program returned, if `finished`."""
    finished: bool = False
    error: Record = field(default_factory=dict)
    """The error that the program raised, if it did."""
    refused: bool = False
    """Whether it was raised where the program allows for it (`Rank.may_refuse`)."""
    lost: str = ""
    """How the rank hung or died, if it did."""

    def __str__(self) -> str:
        if self.finished:
            return "finished"
        return self.lost or f"raised {show_error(self.error)}"


class Ranks:
    """Runs programs on a target. A context manager.

    Args:
        target: ``module:attribute`` of what is judged.
        world: The number of ranks.
    """

    def __init__(self, target: str, world: int) -> None:
        self.target, self.world = target, world
        self.folder = Path()
        self._groups: dict[int, WorkerGroup] = {}
        self._directory = scratch.choose()
        self._has_run = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def begin(self) -> None:
        """Empty the folder that programs share, for another promise."""
        self.folder = self._directory / "peers"
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)

    def run(self, program: Callable[..., object], *, world: int | None = None, **arguments: Any) -> list[Any]:
        """Run ``program`` on every rank.

        Args:
            program: A function at the top level of a module, which is called with a `Rank` and ``arguments``.
            world: The number of ranks, if it is another than usual.
            arguments: Plain data or tensors.

        Returns:
            What each rank returned.

        Raises:
            NotOffered: The library does not offer what the program needs.
            Differs: A rank raised, died or hung.
        """
        outcomes = self.attempt(program, world=world, **arguments)
        for rank, outcome in enumerate(outcomes):
            if not outcome.finished and not _is_consequence(outcome, outcomes):
                raise Differs(f"rank {rank} {outcome}")
        return [outcome.result for outcome in outcomes]

    def attempt(
        self,
        program: Callable[..., object],
        *,
        world: int | None = None,
        seconds: float | None = None,
        **arguments: Any,
    ) -> list[Outcome]:
        """Run ``program`` where it may fail. Arguments as in `run`; ``seconds`` is the deadline of all ranks, `RUN_SECONDS` by
        default.

        Raises:
            NotOffered: The library does not offer what the program needs.
            Differs: A rank raised, but not where the program allows for it.
        """
        size = world or self.world
        command = {
            "program": f"{program.__module__}:{program.__qualname__}",
            "target": self.target,
            "world": size,
            "arguments": encode(arguments),
        }
        group = self._group(size)
        deadline = (seconds or RUN_SECONDS) + (0.0 if self._has_run else FIRST_SECONDS)
        self._has_run = True
        try:
            outcomes = [
                _outcome(report) for report in group.run(command, deadline, lambda answer: "result" not in answer)
            ]
        finally:
            group.end_workers()
        failed = [rank for rank, outcome in enumerate(outcomes) if outcome.error and not outcome.refused]
        if failed:
            killed = [rank for rank, outcome in enumerate(outcomes) if outcome.lost.startswith("was killed")]
            rank = (killed or failed)[0]  # that the connection to a killed rank is lost is a consequence
            raise Differs(f"rank {rank} {outcomes[rank]}")
        return outcomes

    def _group(self, size: int) -> WorkerGroup:
        if size not in self._groups:
            self._groups[size] = WorkerGroup(
                size,
                start_seconds=START_SECONDS,
                worker="lightrft.conformance.peers.worker",
                preloaded=("torch._dynamo", "lightrft.conformance.peers.promises", self.target.partition(":")[0]),
                directory=self._directory,
                environment={"LOCAL_WORLD_SIZE": str(size), "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "peers"},
            )
        return self._groups[size]

    def close(self) -> None:
        """End all processes, and remove what they wrote."""
        while self._groups:
            self._groups.popitem()[1].close()
        shutil.rmtree(self._directory, ignore_errors=True)


def _outcome(report: RankReport) -> Outcome:
    answer = report.answer
    if "not_offered" in answer:
        raise NotOffered(*answer["not_offered"])
    if "error" in answer:
        return Outcome(error=answer["error"], refused=answer["refused"])
    if report.detail.startswith("could not be started"):
        raise NotJudged(f"the ranks {report.detail}")
    if report.state == "died":
        return Outcome(lost="\n".join(report.detail.split("; last output: ", 1)))
    if report.state != "answered":
        return Outcome(lost=f"{report.state}\n{report.detail}")
    return Outcome(result=decode(answer["result"]), finished=True)


def _is_consequence(outcome: Outcome, outcomes: list[Outcome]) -> bool:
    """Whether a rank hung because another one raised: then that error is the one to show."""
    return outcome.lost.startswith("hung") and any(other.error for other in outcomes)
