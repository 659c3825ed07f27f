"""A whole run: start the workers, ask the strategy what it is, judge every clause, and say how it came out."""

import json
import os
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import get_context
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

import torch

from lightrft.conformance.clause import Clause, Operation, Place
from lightrft.conformance.contract import CONTRACT
from lightrft.conformance.contract.drawing import FP32
from lightrft.conformance.contract.rollouts import rollout
from lightrft.conformance.driver.group import WorkerGroup
from lightrft.conformance.driver.nursery import PRELOADED
from lightrft.conformance.expectations import Expectations
from lightrft.conformance.judge import ClauseResult, Judge, Unjudgeable
from lightrft.conformance.profiles import PROFILES, Profile
from lightrft.conformance.provenance import environment, version_of
from lightrft.conformance.values import decode

CONTRACT_VERSION = "1"


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be certified, and how."""

    strategy: str
    world: int = 1
    device: str = "cpu"
    profile: str = "ci"
    settings: Mapping[str, Any] = field(default_factory=dict)
    clauses: Sequence[str] = ()
    seed: int = 0
    expectations: Path | None = None
    engine: str = ""
    """The engine to be certified, with ``strategy`` below it; empty where the strategy is."""

    def command(self, clause: str | None = None) -> str:
        """The command line that repeats this."""
        parts = ["lightrft-conformance", "run", self.strategy]
        if self.engine:
            parts = ["lightrft-conformance", "run-engine", self.engine, f"--strategy {self.strategy}"]
        parts += [f"--world-size {self.world}", f"--device {self.device}"]
        parts += [f"--set {name}={value}" for name, value in self.settings.items()]
        parts += [f"--profile {self.profile}", f"--seed {self.seed}"]
        return " ".join(parts + ([f"--clause {clause}"] if clause else []))


@dataclass(kw_only=True)
class Report:
    """The outcome of a run."""

    request: Request
    identity: dict[str, Any]
    results: list[ClauseResult]
    unjudged: str = ""
    """Why the strategy could not be judged at all; empty where it was."""

    @property
    def exit_code(self) -> int:
        """0: every MUST holds; 1: some do not; 2: it could not be judged."""
        if self.unjudged or any(result.verdict == "error" for result in self.results):
            return 2
        broken = [it for it in self.results if it.level == "MUST" and it.verdict in ("fail", "hang")]
        return 1 if broken else 0

    def to_json(self) -> dict[str, Any]:
        """The report as plain data."""
        request = self.request
        return {
            "suite": version_of("lightrft-conformance"),
            "contract": CONTRACT_VERSION,
            "strategy": {"name": request.strategy, "settings": dict(request.settings), **self.identity},
            "environment": environment(),
            "profile": request.profile,
            "seed": request.seed,
            "world_size": request.world,
            "device": request.device,
            "exit_code": self.exit_code,
            "unjudged": self.unjudged,
            "reproduce": request.command(),
            "clauses": [{**asdict(it), "reproduce": request.command(it.id)} for it in self.results],
        }


def setting(text: str) -> tuple[str, Any]:
    """``NAME=VALUE`` of a command line; the value is JSON, or a string."""
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"{text!r}: write NAME=VALUE")
    try:
        return name, json.loads(value.lower() if value in ("True", "False", "None") else value)
    except json.JSONDecodeError:
        return name, value


MODEL_LIBRARY_ENGINES = ("transformers", "vllm", "sglang")
"""Engines that run models of transformers only."""
ENGINE_CLAUSES = ("ENG-", "SYNC-", "GEN-")


def selected(ids: Sequence[str], *, engine: bool = False) -> Iterator[Clause]:
    """The clauses with these ids, or all, in the order in which to judge them; for an ``engine``, those of engines."""
    for clause in sorted(CONTRACT, key=lambda it: it.ends_workers):
        if (not ids or clause.id in ids) and (not engine or clause.id.startswith(ENGINE_CLAUSES)):
            yield clause


class Certification:
    """One strategy at one place, with its workers. A context manager."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.profile: Profile = PROFILES[request.profile]
        self.identity: dict[str, Any] = {}
        self.results: list[ClauseResult] = []
        """Of the clauses judged so far."""
        self.expectations = Expectations.read(request.expectations, request.strategy, request.settings)
        self._group: WorkerGroup | None = None
        self._judge: Judge | None = None

    def __enter__(self) -> "Certification":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def open(self, group: WorkerGroup | None = None) -> None:
        """Start the workers and ask what the strategy is. Raises `Unjudgeable` where it cannot even be made.

        A ``group`` that is given is used, and stays its owner's.
        """
        torch.set_num_threads(1)  # as in the workers: the number of threads changes the order of sums
        if group is None:
            preloaded = PRELOADED if self.request.device == "cpu" else ()
            group = self._group = WorkerGroup(self.request.world, ranks=self.request.world > 1, preloaded=preloaded)
        self.identity = self._ask(group)
        place = Place(
            strategy=self.request.strategy,
            world=self.request.world,
            device=self.request.device,
            settings=dict(self.request.settings),
            capabilities=frozenset(self.identity["capabilities"]),
            grouped=self.identity["grouped"],
            engine=self.request.engine or "fake",
            language_model="llama" if self.request.engine in MODEL_LIBRARY_ENGINES else "language",
        )
        if self.request.engine:
            place = replace(place, sleep_levels=self._ask_engine(group, place))
        self._judge = Judge(
            place=place,
            profile=self.profile,
            seed=self.request.seed,
            group=group,
            database=".lightrft-conformance",
        )

    def _ask(self, group: WorkerGroup) -> dict[str, Any]:
        """What the strategy says that it is."""
        question = {"do": "identity", "name": self.request.strategy, "engine": self.request.engine}
        identity: dict[str, Any] = self._answer(group, [question])
        return identity

    def _ask_engine(self, group: WorkerGroup, place: Place) -> frozenset[int]:
        """Which levels of sleep the engine says that it has. One that cannot say is judged as one that has all."""
        try:
            return frozenset(self._answer(group, [*rollout(place), {"do": "sleep_levels"}]))
        except Unjudgeable:
            return place.sleep_levels

    def _answer(self, group: WorkerGroup, operations: Sequence[Operation]) -> Any:
        """What rank 0 observed in the last operation."""
        program = {
            "strategy": self.request.strategy,
            "fixed": {"device": self.request.device, **self.request.settings},
            "settings": {"train_batch_size": self.request.world, "micro_train_batch_size": 1, **FP32},
            "operations": list(operations),
        }
        reports = group.run({"program": program}, 300.0)
        for rank, report in enumerate(reports):
            if report.state != "answered":
                raise Unjudgeable(f"rank {rank} {report.state}: {report.detail}")
            if "broken" in report.answer:
                raise Unjudgeable(f"rank {rank}: the suite failed: {report.answer['broken']}")
            observed = report.answer["observations"][-1]
            if "error" in observed:
                raise Unjudgeable(f"rank {rank}: it cannot be made: {observed['error'][0]}: {observed['message']}")
        return decode(reports[0].answer["observations"][-1])

    def judge(self, clause: Clause) -> ClauseResult:
        """Judge one clause, in the light of what is expected to fail."""
        assert self._judge is not None
        self.results.append(self.expectations.applied(self._judge.judge(clause)))
        return self.results[-1]

    def close(self) -> None:
        """End the workers."""
        if self._group is not None:
            self._group.close()
            self._group = None


@contextmanager
def processes(jobs: int) -> Iterator[ProcessPoolExecutor | None]:
    """``jobs`` processes for `certify`, or None for one, and where a full disk has no room for what processes share.

    They are forked, so that none of them imports everything again; so make them before there are threads.
    """
    pool = None
    if jobs > 1:
        with suppress(OSError):
            pool = ProcessPoolExecutor(jobs, mp_context=get_context("fork"))
            pool.submit(os.getpid).result()
    with pool or nullcontext():
        yield pool


def certify(
    request: Request,
    tell: Callable[[ClauseResult], None] = lambda result: None,
    pool: ProcessPoolExecutor | None = None,
) -> Report:
    """Judge every clause that ``request`` selects, several at a time in a ``pool``; ``tell`` hears of each as it is done."""
    unknown = [it for it in request.clauses if it not in CONTRACT.ids]
    if unknown:
        return Report(request=request, identity={}, results=[], unjudged=f"there is no clause {', '.join(unknown)}")
    identity: dict[str, Any] = {}
    results: list[ClauseResult] = []
    try:
        expectations = Expectations.read(request.expectations, request.strategy, request.settings)
    except (OSError, ValueError, TypeError) as error:
        unread = f"the file of expected failures cannot be read: {request.expectations}: {error}"
        return Report(request=request, identity={}, results=[], unjudged=unread)
    unjudged = expectations.unknown(CONTRACT.ids)
    try:
        if not unjudged:
            for said, result in _judged(request, pool):
                identity = said
                results.append(result)
                tell(result)
    except Unjudgeable as error:
        unjudged = str(error)
    except Exception as error:  # noqa: BLE001 - of the suite, or of the machine: no verdict on the strategy
        unjudged = f"the suite failed, which is no verdict: {error!r}, {traceback.format_exc(limit=-2)}"
    return Report(request=request, identity=identity, results=in_order(results), unjudged=unjudged)


Judged = tuple[dict[str, Any], ClauseResult]
"""What the strategy says that it is, and what became of a clause."""


def _judged(request: Request, pool: ProcessPoolExecutor | None) -> Iterator[Judged]:
    chosen = [clause.id for clause in selected(request.clauses, engine=bool(request.engine))]
    return _one_by_one(request, chosen) if pool is None or len(chosen) < 2 else _side_by_side(request, chosen, pool)


def _one_by_one(request: Request, chosen: Sequence[str]) -> Iterator[Judged]:
    with Certification(request) as certification:
        certification.open()
        for clause in chosen:
            yield certification.identity, certification.judge(CONTRACT[clause])


def _side_by_side(request: Request, chosen: Sequence[str], pool: ProcessPoolExecutor) -> Iterator[Judged]:
    """In processes that have workers of their own. What each clause draws is a matter of its seed alone.

    Those that end workers come first here: starting anew takes longest, and nobody waits for the last one.
    """
    try:
        for done in as_completed([pool.submit(_judge_here, request, it) for it in reversed(chosen)]):
            yield done.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _judge_here(request: Request, clause: str) -> Judged:
    certification = _certification_here(request)
    return certification.identity, certification.judge(CONTRACT[clause])


_here: list[Certification] = []
"""This process's own, made for its first clause."""


def _certification_here(request: Request) -> Certification:
    if not _here:
        certification = Certification(request)
        Finalize(None, certification.close, exitpriority=10)
        certification.open()
        _here.append(certification)
    return _here[0]


def in_order(results: Sequence[ClauseResult]) -> list[ClauseResult]:
    """In the order of the contract."""
    return sorted(results, key=lambda it: CONTRACT.ids.index(it.id))
