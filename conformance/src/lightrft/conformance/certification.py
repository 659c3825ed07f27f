"""A whole run: start the workers, identify the strategy, judge every clause, and report the results."""

import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain
from multiprocessing.util import Finalize
from typing import Any

import torch

from lightrft.conformance import scratch
from lightrft.conformance.clause import Clause, Operation, Target, is_error, show_error
from lightrft.conformance.contract import CONTRACT
from lightrft.conformance.contract.program_parts import FP32
from lightrft.conformance.contract.rollout_checks import rollout
from lightrft.conformance.driver.fork_server import PRELOADED, ForkServer, load_before_fork
from lightrft.conformance.driver.wire import ConnectionLost
from lightrft.conformance.driver.worker_group import WorkerGroup, launch_fork_server
from lightrft.conformance.expectations import Expectations
from lightrft.conformance.judge import ClauseResult, Judge, NotInstalled, Unjudgeable, missing_package
from lightrft.conformance.process_pool import process_pool
from lightrft.conformance.profiles import PROFILES, Profile
from lightrft.conformance.provenance import digest_of_suite, environment, version_of
from lightrft.conformance.requests import MODEL_LIBRARY_ENGINES, Request, impossible, selected
from lightrft.conformance.values import Record, decode

CONTRACT_VERSION = "1"
USED_BY_REFERENCE = ("torch._dynamo", "transformers.models.llama")
"""Modules that the reference imports as it runs."""

LONGEST = ("LIFE", "CKPT", "EXPORT", "NORM", "OPT")
"""Families whose clauses take longest: they are judged first, so that no process is left alone with one at the end."""


@dataclass(kw_only=True)
class Report:
    """The results of a run."""

    request: Request
    identity: Record
    results: list[ClauseResult]
    unjudged: str = ""
    """Why the strategy, or a clause that was asked for by name, could not be judged; empty if it was."""

    @property
    def exit_code(self) -> int:
        """0: every MUST holds; 1: at least one does not; 2: the suite could not run the strategy."""
        if self.unjudged or any(result.verdict == "error" for result in self.results):
            return 2
        failed = [result for result in self.results if result.level == "MUST" and result.verdict in ("fail", "hang")]
        return 1 if failed else 0

    def to_json(self) -> Record:
        """The report as plain data."""
        request = self.request
        return {
            "suite": version_of("lightrft-conformance"),
            "suite_digest": digest_of_suite(),
            "contract": CONTRACT_VERSION,
            "strategy": {"name": request.strategy, "settings": dict(request.settings), **self.identity},
            "environment": environment(),
            "profile": request.profile,
            "seed": request.seed,
            "selected": list(request.clauses),
            "world_size": request.world,
            "device": request.device,
            "exit_code": self.exit_code,
            "unjudged": self.unjudged,
            "reproduce": request.command(),
            "clauses": [
                {**asdict(result), "text": CONTRACT[result.id].text, "reproduce": request.command(result.id)}
                for result in self.results
            ],
        }


class Interrupted(KeyboardInterrupt):
    """A certification was interrupted."""

    def __init__(self, report: Report) -> None:
        super().__init__(report.unjudged)
        self.report = report
        """Of the clauses that were judged before."""


class Certification:
    """One target and its workers. A context manager."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.profile: Profile = PROFILES[request.profile]
        self.identity: Record = {}
        self.results: list[ClauseResult] = []
        """The results of the clauses judged so far."""
        self.expectations = Expectations.read(request.expectations, request.strategy, request.settings)
        self._group: WorkerGroup | None = None
        self._judge: Judge | None = None

    def __enter__(self) -> "Certification":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def open(self, group: WorkerGroup | None = None) -> None:
        """Start the workers and identify the strategy.

        Args:
            group: Workers to use. The caller closes them. By default the certification starts its own.

        Raises:
            Unjudgeable: The strategy cannot be created.
        """
        torch.set_num_threads(1)  # as in the workers: the number of threads changes the summation order
        if group is None:
            group = self._group = WorkerGroup(
                self.request.world,
                ranks=self.request.world > 1,
                preloaded=_preloaded(self.request),
                fork_servers=_fork_servers_of_process,
            )
            _fork_servers_of_process.clear()
        self.identity = self._ask(group)
        target = Target(
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
            target = replace(target, sleep_levels=self._ask_engine(group, target))
        self._judge = Judge(
            target=target,
            profile=self.profile,
            seed=self.request.seed,
            group=group,
            database=".lightrft-conformance",
            deadline_factor=self.request.deadline_factor,
        )

    def _ask(self, group: WorkerGroup) -> Record:
        """The class, origin and capabilities of the strategy."""
        question = {"do": "identity", "name": self.request.strategy, "engine": self.request.engine}
        identity: Record = self._answer(group, [question])
        if self.request.world > 1 and not identity["grouped"]:
            raise Unjudgeable(
                f"expected {self.request.strategy} to form a process group of {self.request.world} ranks, got separate "
                f"processes. Certify it with --world-size 1"
            )
        return identity

    def _ask_engine(self, group: WorkerGroup, target: Target) -> frozenset[int]:
        """The sleep levels that the engine claims to support; all levels if it fails to answer."""
        try:
            return frozenset(self._answer(group, [*rollout(target), {"do": "sleep_levels"}]))
        except NotInstalled:
            raise
        except Unjudgeable:
            return target.sleep_levels

    def _answer(self, group: WorkerGroup, operations: Sequence[Operation]) -> Any:
        """The observation of the last operation on rank 0."""
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
            if is_error(observed):
                if missing_package(observed):
                    raise NotInstalled(_refusal(rank, observed))
                raise Unjudgeable(_refusal(rank, observed))
        return decode(reports[0].answer["observations"][-1])

    def judge(self, clause: Clause) -> ClauseResult:
        """Judge one clause, and apply the expected failures."""
        assert self._judge is not None
        self.results.append(self.expectations.applied(self._judge.judge(clause)))
        return self.results[-1]

    def close(self) -> None:
        """End the workers, if the certification started them."""
        if self._group is not None:
            self._group.close()
            self._group = None


def _preloaded(request: Request) -> Sequence[str]:
    return PRELOADED if request.device == "cpu" else ()


@contextmanager
def processes(jobs: int, request: Request) -> Iterator[ProcessPoolExecutor | None]:
    """A pool of at most ``jobs`` processes in which `certify` judges ``request``.

    None for one job or one clause, or if a full disk prevents a pool.
    """
    jobs = min(jobs, len(list(selected(request.clauses, engine=bool(request.engine)))))
    with ExitStack() as stack:
        pool = None
        if jobs > 1:
            with suppress(OSError):
                copies = stack.enter_context(_fork_servers(jobs, request))
                pool = stack.enter_context(process_pool(jobs, partial(_take_fork_servers, copies)))
                for fork_server in chain(*copies):
                    fork_server.release()
        yield pool


@contextmanager
def _fork_servers(jobs: int, request: Request) -> Iterator[list[list[ForkServer]]]:
    """The fork servers of each job: copies of one fork server per rank, which imports once for all jobs.

    Meanwhile this process imports what the reference needs. Yields empty lists, with which each job starts its own fork
    servers, if one of them ends or does not answer. The originals live as long as the body, because they reap their copies.
    """
    copies: list[list[ForkServer]] = [[] for _ in range(jobs)]
    with ExitStack() as originals, ExitStack() as unused:
        started = []
        for _ in range(request.world):
            started.append(launch_fork_server(_preloaded(request)))
            originals.callback(started[-1].close)
        load_before_fork(USED_BY_REFERENCE)
        try:
            for of_job in copies:
                directory = scratch.choose()
                for original in started:
                    of_job.append(original.copy(directory))
                    unused.callback(of_job[-1].close)  # nothing is left to close once it is released
        except ConnectionLost:
            unused.close()
            copies = [[] for _ in range(jobs)]
        yield copies


_fork_servers_of_process: list[ForkServer] = []
"""Those of this job, until its certification has them."""


def _take_fork_servers(copies: Sequence[Sequence[ForkServer]], number: int) -> None:
    """Keep the fork servers of job ``number``, and release the others, so that each ends with its own job."""
    _fork_servers_of_process[:] = copies[number]
    for fork_server in chain(*copies[:number], *copies[number + 1 :]):
        fork_server.release()


def certify(
    request: Request,
    on_result: Callable[[ClauseResult], None] = lambda result: None,
    pool: ProcessPoolExecutor | None = None,
) -> Report:
    """Judge every clause that ``request`` selects.

    Args:
        request: What to certify, and how.
        on_result: Called with each result as soon as it is known.
        pool: Judges several clauses at a time; see `processes`.

    Returns:
        The report, also if the strategy, or a clause that was asked for by name, could not be judged.

    Raises:
        Interrupted: On Ctrl-C, with the report of what was judged before.
    """
    unjudged = impossible(request)
    identity: Record = {}
    results: list[ClauseResult] = []
    try:
        if not unjudged:
            for reported, result in _judged(request, pool):
                identity = reported
                results.append(result)
                on_result(result)
    except Unjudgeable as error:
        unjudged = str(error)
    except KeyboardInterrupt as interruption:
        total = len(list(selected(request.clauses, engine=bool(request.engine))))
        unjudged = f"was interrupted after {len(results)} of {total} clauses"
        report = Report(request=request, identity=identity, results=in_order(results), unjudged=unjudged)
        raise Interrupted(report) from interruption
    except Exception as error:  # noqa: BLE001 - of the suite or the machine: no verdict on the strategy
        unjudged = f"the suite failed: {error!r}, {traceback.format_exc(limit=-2)}"
    unjudged = unjudged or _not_applicable(request, results)
    return Report(request=request, identity=identity, results=in_order(results), unjudged=unjudged)


def _not_applicable(request: Request, results: Sequence[ClauseResult]) -> str:
    """The clauses that were requested by name and did not apply, with the reasons; empty if there are none."""
    skipped = [f"{result.id} {result.message}" for result in results if result.verdict == "skip"]
    return "; ".join(skipped) if request.clauses else ""


def _refusal(rank: int, observed: Record) -> str:
    """Why the strategy cannot be created. Messages of `LightRFTError` are returned unchanged."""
    if "lightrft.config.errors.LightRFTError" in observed["error"]:
        return str(observed["message"])
    return f"rank {rank}: the strategy cannot be created: {show_error(observed)}"


Judged = tuple[Record, ClauseResult]
"""The identity of the strategy, and the result of a clause."""


def _judged(request: Request, pool: ProcessPoolExecutor | None) -> Iterator[Judged]:
    chosen = [clause.id for clause in selected(request.clauses, engine=bool(request.engine))]
    return _one_by_one(request, chosen) if pool is None or len(chosen) < 2 else _side_by_side(request, chosen, pool)


def _one_by_one(request: Request, chosen: Sequence[str]) -> Iterator[Judged]:
    with Certification(request) as certification:
        certification.open()
        for clause in chosen:
            yield certification.identity, certification.judge(CONTRACT[clause])


def _side_by_side(request: Request, chosen: Sequence[str], pool: ProcessPoolExecutor) -> Iterator[Judged]:
    """Judge in processes that have their own workers. What a clause draws depends only on its seed."""
    order = sorted(chosen, key=lambda clause_id: not clause_id.startswith(LONGEST))
    for done in as_completed([pool.submit(_judge_in_process, request, clause_id) for clause_id in order]):
        yield done.result()


def _judge_in_process(request: Request, clause: str) -> Judged:
    certification = _certification_of_process(request)
    return certification.identity, certification.judge(CONTRACT[clause])


_certifications: list[Certification] = []
"""The certification of this process, created for its first clause."""


def _certification_of_process(request: Request) -> Certification:
    if not _certifications:
        certification = Certification(request)
        Finalize(None, certification.close, exitpriority=10)
        certification.open()
        _certifications.append(certification)
    return _certifications[0]


def in_order(results: Sequence[ClauseResult]) -> list[ClauseResult]:
    """Sort results in the order of the contract."""
    return sorted(results, key=lambda result: CONTRACT.ids.index(result.id))
