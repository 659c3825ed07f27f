"""Judges a strategy: for each clause its pinned examples, then programs that Hypothesis draws.

Hypothesis runs only here, in the driver. It draws a program, the group of workers runs it, and the clause compares the
observations with the reference and with each other. A hang is the verdict after one repetition: it is not shrunk,
because each attempt would take the whole deadline. Other failures are shrunk for `SHRINK_SECONDS`, and not at all if
one attempt takes longer than `SLOW_SECONDS`.
"""

import math
import re
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import hypothesis
from hypothesis import HealthCheck, Phase
from hypothesis.database import DirectoryBasedExampleDatabase

from lightrft.conformance.clause import (
    Clause,
    Execution,
    Level,
    Program,
    Target,
    UnexpectedError,
    Violation,
    decoded,
    is_error,
    show,
    show_error,
)
from lightrft.conformance.driver.worker_group import RankReport, WorkerGroup
from lightrft.conformance.profiles import Profile
from lightrft.conformance.values import Record

FATAL = ("exit_process", "kill_within")
"""Operations that end ranks."""
SLOW_SECONDS = 5.0
"""The longest attempt of a failure to shrink."""
SHRINK_SECONDS = 30.0
"""How long to look for a smaller program after the first failure of a clause."""

Verdict = Literal["pass", "fail", "hang", "error", "skip", "xfail"]


@dataclass(frozen=True, kw_only=True)
class ClauseResult:
    """The result of one clause."""

    id: str
    level: Level
    verdict: Verdict
    examples: int = 0
    """The number of programs that ran."""
    drawn: int | None = None
    """How many of them were drawn; None if the clause draws none, or if a program that failed ended the search."""
    seconds: float = 0.0
    message: str = ""
    program: Record | None = None
    """The smallest failing program."""
    observations: list[list[str]] | None = None
    """What each rank observed in it, as text."""
    pinned: bool = False
    """Whether the clause failed before any program was drawn, as it would with every seed."""
    pinned_example: str = ""
    """The failing program as code to add to the pinned examples; empty if it is one."""


class Hang(BaseException):
    """A rank missed the deadline. Not an Exception, so that Hypothesis neither catches nor shrinks it."""

    def __init__(self, program: Program, detail: str) -> None:
        super().__init__(detail)
        self.program, self.detail = program, detail


class Unjudgeable(BaseException):
    """The workers could not run the program: the strategy cannot be created, or the suite failed."""


class NotInstalled(Unjudgeable):
    """The program needs a package that is not installed."""


class SmallEnough(BaseException):
    """A failure that is not shrunk further. Not an Exception, so that Hypothesis does not catch it."""

    def __init__(self, violation: Violation) -> None:
        super().__init__(str(violation))
        self.violation = violation


class Died(Violation):
    """A rank ended although its program does not end it."""


@dataclass(kw_only=True)
class Judge:
    """Judges one target."""

    target: Target
    profile: Profile
    seed: int = 0
    group: WorkerGroup
    database: str | None = None
    deadline_factor: float = 1.0
    """Factor of the deadlines of programs."""
    executions: int = field(default=0, init=False)

    def judge(self, clause: Clause) -> ClauseResult:
        """Judge one clause."""
        reason = self.not_applicable(clause)
        if reason is not None:
            return ClauseResult(id=clause.id, level=clause.level, verdict="skip", message=reason)
        start, before = time.monotonic(), self.executions
        denied = clause.capability is not None and clause.capability not in self.target.capabilities
        verdict, message, program, execution = self._outcome(lambda: self._search(clause))
        drawn = self.executions - self._pinned if verdict == "pass" and self._drawing else None
        if verdict == "pass" and self.executions == before:
            verdict, message = "skip", f"no program for this target in profile {self.profile.name}"
        if denied and verdict not in ("error", "skip"):
            verdict, message = _if_denied(verdict, clause, message)
        shown = program if verdict not in ("pass", "skip") else None
        pinned = verdict in ("fail", "hang") and not self._drawing
        return ClauseResult(
            id=clause.id,
            level=clause.level,
            verdict=verdict,
            examples=self.executions - before,
            drawn=drawn,
            seconds=round(time.monotonic() - start, 3),
            message=message,
            program=None if shown is None else shown.command(self.target)["program"],
            observations=None if execution is None or verdict == "pass" else _as_text(execution),
            pinned=pinned,
            pinned_example="" if shown is None or pinned else shown.source(self.target),
        )

    def not_applicable(self, clause: Clause) -> str | None:
        """The reason why a clause does not apply to this target, or None."""
        if clause.smallest_world > self.target.world:
            return f"needs world size {clause.smallest_world}"
        if clause.needs_cuda and self.target.device != "cuda":
            return "needs CUDA"
        if clause.grouped_only and not self.target.grouped:
            return "needs a process group, which this strategy does not have"
        return None

    # Searching

    def _outcome(self, search: Callable[[], None]) -> tuple[Verdict, str, Program | None, Execution | None]:
        self._failed: tuple[Program, Execution | None] | None = None
        self._failing_since, self._drawing, self._pinned = math.inf, False, 0
        try:
            search()
        except Hang as hang:
            return "hang", hang.detail, hang.program, None
        except Unjudgeable as error:
            return "error", str(error), None, None
        except (Violation, SmallEnough, hypothesis.errors.Flaky) as failure:
            program, execution = self._failed or (None, None)
            violation = failure.violation if isinstance(failure, SmallEnough) else failure
            return "fail", _first_lines(violation), program, execution
        except Exception:  # noqa: BLE001 - a bug in a clause or a failing machine: no verdict on the strategy
            return "error", f"the suite failed: {traceback.format_exc(limit=-3)}", None, None
        return "pass", "", None, None

    def _search(self, clause: Clause) -> None:
        for program in clause.pinned_examples(self.target):
            self._try(clause, program)
        programs = clause.programs(self.target)
        if programs is None or not self.profile.examples:
            return

        def holds(program: Program) -> None:
            self._try(clause, program)

        self._drawing, self._pinned = True, self.executions
        database = DirectoryBasedExampleDatabase(self.database) if self.profile.random and self.database else None
        limits = hypothesis.settings(
            max_examples=self.profile.examples,
            deadline=None,
            database=database,
            derandomize=False,
            phases=[Phase.reuse, Phase.generate, Phase.shrink]
            if self.profile.random
            else [Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
            report_multiple_bugs=False,
            print_blob=False,
        )
        prove = hypothesis.seed(self._seed_for(clause))(limits(hypothesis.given(programs)(holds)))
        with _quiet():
            prove()

    def _seed_for(self, clause: Clause) -> int:
        base = time.time_ns() if self.profile.random and not self.seed else self.seed
        return base * 1009 + sum(map(ord, clause.id))

    def _try(self, clause: Clause, program: Program) -> None:
        """Run ``program``, check it, and remember it if it fails."""
        execution: Execution | None = None
        start = time.monotonic()
        try:
            execution = self.run(program)
            clause.check(execution)
            return
        except UnexpectedError as error:
            package = missing_package(error.observed)
            if package:
                raise NotInstalled(f"{clause.id} {package}") from error
            violation: Violation = clause.violation(str(error))
        except Died as died:
            violation = clause.violation(str(died))
        except Violation as failed:
            violation = failed
        except Exception as error:
            if execution is None or isinstance(error, (OSError, MemoryError)):
                text = traceback.format_exc(limit=-3)
                raise Unjudgeable(f"the suite failed while judging {clause.id}: {text}") from error
            violation = clause.violation(_wrong_types(error))
        self._failed = (program, execution)
        now = time.monotonic()
        self._failing_since = min(now, self._failing_since)
        if now - start > SLOW_SECONDS or now - self._failing_since > SHRINK_SECONDS:
            raise SmallEnough(violation)
        raise violation from None

    # Running

    def run(self, program: Program) -> Execution:
        """Run one program on all ranks.

        A program that hung, or in which a rank was killed from outside, runs once more before it counts.

        Raises:
            Hang: A rank missed the deadline.
            Died: A rank ended unexpectedly.
            UnexpectedError: A rank raised an error, and others waited for it.
            Unjudgeable: The suite failed.
        """
        self.executions += 1
        reports = self._send(program)
        hung = any(report.state == "hung" for report in reports)
        if _unexpected_dead(program, reports, killed=True) or (hung and not _gave_up(program, reports)):
            reports = self._send(program)
        broken = [(rank, report) for rank, report in enumerate(reports) if "broken" in report.answer]
        if broken:
            raise Unjudgeable(f"rank {broken[0][0]}: the suite failed: {broken[0][1].answer['broken']}")
        dead = _unexpected_dead(program, reports)
        if dead:
            raise Died(f"rank {dead[0]} {reports[dead[0]].detail}")
        _raise_error_of_peer(program, reports)
        if any(report.state == "hung" for report in reports):
            raise Hang(program, _hung(reports, self._seconds(program)))
        answers = [report.answer if report.state == "answered" else {"observations": []} for report in reports]
        afterwards = None
        if program.afterwards is not None:
            self.group.end_workers()
            afterwards = self.run(program.afterwards)
        return Execution(target=self.target, program=program, observations=decoded(answers), afterwards=afterwards)

    def _send(self, program: Program) -> list[RankReport]:
        gave_up = lambda answer: "broken" in answer or _failed_at(program, answer) is not None  # noqa: E731
        return self.group.run(program.command(self.target), self._seconds(program), gave_up)

    def _seconds(self, program: Program) -> float:
        """The deadline of ``program``: twice its own if a library of the target may have to build something first."""
        target = self.target
        factor = 2 if target.grouped or target.device != "cpu" or target.engine != "fake" else 1
        return program.seconds * factor * self.deadline_factor


def _unexpected_dead(program: Program, reports: Sequence[RankReport], killed: bool = False) -> list[int]:
    """The ranks that died although the program does not end them; with ``killed``, only those killed from outside."""
    ended = {rank for operation in program.operations if operation["do"] in FATAL for rank in operation["ranks"]}
    return [
        rank
        for rank, report in enumerate(reports)
        if report.state == "died" and rank not in ended and (report.killed or not killed)
    ]


def _failed_at(program: Program, answer: Record) -> int | None:
    """The operation whose error ended the program on the rank that gave ``answer``; None if it ran to its end."""
    last = len(answer.get("observations", ())) - 1
    ended = last >= 0 and is_error(answer["observations"][last]) and not program.operations[last].get("may_fail")
    return last if ended else None


def _gave_up(program: Program, reports: Sequence[RankReport]) -> list[int]:
    """The ranks that ended the program with an error."""
    return [rank for rank, report in enumerate(reports) if _failed_at(program, report.answer) is not None]


def _raise_error_of_peer(program: Program, reports: Sequence[RankReport]) -> None:
    """Raise the error that ended the program on one rank, if others waited for that rank, to the deadline or to an error."""
    waited = [
        rank for rank, report in enumerate(reports) if report.state == "hung" or _lost_peer(program, report.answer)
    ]
    for rank in _gave_up(program, reports):
        if waited and rank not in waited:
            observed = reports[rank].answer["observations"][-1]
            call = program.operations[len(reports[rank].answer["observations"]) - 1]["do"]
            others = ", ".join(map(str, waited))
            error = f"rank {rank}: {call} raised {show_error(observed)}\nwhile rank {others} waited in it or after it"
            raise UnexpectedError(f"{error}\n{_stacks(reports)}", observed)


def _lost_peer(program: Program, answer: Record) -> bool:
    """Whether the program ended with LightRFT's error for a rank whose peer is gone."""
    last = _failed_at(program, answer)
    return last is not None and "waited for another rank" in answer["observations"][last]["message"]


def missing_package(observed: object) -> str:
    """The package that an observed error reports as not installed, with the command that installs it; empty for other errors."""
    if not is_error(observed):
        return ""
    names = [name.rpartition(".")[2] for name in observed["error"]]
    if "BackendNotInstalledError" in names:
        return f"needs a package: {observed['message']}"
    module = re.search(r"No module named '([^'.]+)", observed["message"])
    if "ModuleNotFoundError" not in names or module is None:
        return ""
    name = module.group(1)
    package = "lightrft-conformance[transformers]" if name in ("transformers", "tokenizers") else name
    return f"needs the package {name}, which is not installed. Install it with: pip install '{package}'"


def _wrong_types(error: Exception) -> str:
    """Describe an error in a check, which the types of what the strategy returned must have caused."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{frame.filename.rpartition('/')[2]}:{frame.lineno}"
    return f"what the ranks returned cannot be compared: {type(error).__name__}: {error} ({where}: {frame.line})"


def _if_denied(verdict: Verdict, clause: Clause, message: str) -> tuple[Verdict, str]:
    """The verdict on a capability that the strategy does not claim: the clause must fail."""
    if verdict == "pass":
        return (
            "fail",
            f"the strategy has the capability {clause.capability!r} but does not claim it: add it to its capabilities",
        )
    return "pass", f"capability not claimed, and absent: {message.splitlines()[0] if message else verdict}"


def _hung(reports: Iterable[RankReport], seconds: float) -> str:
    return f"no answer within {seconds:g} s\n{_stacks(reports)}"


def _stacks(reports: Iterable[RankReport]) -> str:
    """The state of each rank, with the stack of those that hung."""
    lines = []
    for rank, report in enumerate(reports):
        state = f"rank {rank} {report.state}"
        lines.append(state if not report.detail else f"{state}:\n{report.detail}")
    return "\n".join(lines)


def _as_text(execution: Execution) -> list[list[str]]:
    return [[show(observed) for observed in rank] for rank in execution.observations]


def _first_lines(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:2000]


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress Hypothesis's own output: reports show the failing program."""
    from hypothesis.reporting import with_reporter

    with with_reporter(lambda text: None):
        yield
