"""Judging a strategy: every clause, its witnesses first, then programs that Hypothesis draws.

Hypothesis runs here and only here. It draws a program; the group of workers runs it; the clause compares what
the ranks observed with the reference and with each other. A hung rank ends the search at once: after one
replay it is the verdict, not an example to shrink.
"""

import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import hypothesis
from hypothesis import HealthCheck, Phase
from hypothesis.database import DirectoryBasedExampleDatabase

from lightrft.conformance.clause import Clause, Level, Place, Program, Trial, UnexpectedError, Violation, decoded, show
from lightrft.conformance.driver.group import RankReport, WorkerGroup
from lightrft.conformance.profiles import Profile

FATAL = ("end", "kill_within")
"""Operations by which a program ends ranks."""

Verdict = Literal["pass", "fail", "hang", "error", "skip", "xfail"]


@dataclass(frozen=True, kw_only=True)
class ClauseResult:
    """What became of one clause."""

    id: str
    level: Level
    verdict: Verdict
    examples: int = 0
    seconds: float = 0.0
    message: str = ""
    program: dict[str, Any] | None = None
    """The smallest program found that breaks the promise."""
    observations: list[list[str]] | None = None
    """What each rank observed in it, in words."""
    pinned: bool = False
    """Whether that program is one of the clause's witnesses, which are run whatever the seed."""


class Hang(BaseException):
    """A rank did not answer in time. Not an Exception: Hypothesis must not catch it, nor shrink it."""

    def __init__(self, program: Program, detail: str) -> None:
        super().__init__(detail)
        self.program, self.detail = program, detail


class Unjudgeable(BaseException):
    """The workers could not run the program: the strategy cannot be made, or the suite itself is broken."""


class Died(Violation):
    """A rank ended during a program that does not end it."""


@dataclass(kw_only=True)
class Judge:
    """Judges one strategy at one place."""

    place: Place
    profile: Profile
    seed: int = 0
    group: WorkerGroup
    database: str | None = None
    trials: int = field(default=0, init=False)

    def judge(self, clause: Clause) -> ClauseResult:
        """Put one clause to the test."""
        reason = self.not_applicable(clause)
        if reason is not None:
            return ClauseResult(id=clause.id, level=clause.level, verdict="skip", message=reason)
        begun, before = time.monotonic(), self.trials
        denied = clause.capability is not None and clause.capability not in self.place.capabilities
        verdict, message, program, trial = self._outcome(lambda: self._search(clause))
        if denied and verdict != "error":
            verdict, message = _of_denied(verdict, clause, message)
        return ClauseResult(
            id=clause.id,
            level=clause.level,
            verdict=verdict,
            examples=self.trials - before,
            seconds=round(time.monotonic() - begun, 3),
            message=message,
            program=None if program is None or verdict in ("pass", "skip") else program.command(self.place)["program"],
            observations=None if trial is None or verdict == "pass" else _words(trial),
            pinned=verdict in ("fail", "hang") and program in [*clause.witnesses(self.place)],
        )

    def not_applicable(self, clause: Clause) -> str | None:
        """Why a clause says nothing here, or None."""
        if clause.smallest_world > self.place.world:
            return f"has no teeth below world size {clause.smallest_world}"
        if clause.needs_cuda and self.place.device != "cuda":
            return "needs CUDA"
        if clause.grouped_only and not self.place.grouped:
            return "speaks of process groups, and this strategy has none"
        return None

    # Searching

    def _outcome(self, search: Callable[[], None]) -> tuple[Verdict, str, Program | None, Trial | None]:
        self._failed: tuple[Program, Trial | None] | None = None
        try:
            search()
        except Hang as hang:
            return "hang", hang.detail, hang.program, None
        except Unjudgeable as error:
            return "error", str(error), None, None
        except (Violation, hypothesis.errors.Flaky) as violation:
            program, trial = self._failed or (None, None)
            return "fail", _first_lines(violation), program, trial
        except Exception:  # noqa: BLE001 - a bug of a clause, or a machine that gave out: no verdict on the strategy
            return "error", f"the suite failed: {traceback.format_exc(limit=-3)}", None, None
        return "pass", "", None, None

    def _search(self, clause: Clause) -> None:
        for program in clause.witnesses(self.place):
            self._try(clause, program)
        programs = clause.programs(self.place)
        if programs is None or not self.profile.examples:
            return

        def holds(program: Program) -> None:
            self._try(clause, program)

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
        """Run ``program`` and judge it; remembers what failed."""
        trial: Trial | None = None
        self._failed = (program, None)
        try:
            trial = self.run(program)
            clause.check(trial)
        except (UnexpectedError, Died) as error:
            self._failed = (program, trial)
            raise clause.violation(str(error)) from None
        except Violation:
            self._failed = (program, trial)
            raise
        except Exception as error:
            text = traceback.format_exc(limit=-3)
            raise Unjudgeable(f"the suite failed while judging {clause.id}: {text}") from error

    # Running

    def run(self, program: Program) -> Trial:
        """One program on all ranks. Raises `Hang`, `Died` or `Unjudgeable` where there is nothing to judge.

        A program that hung, or in which somebody else killed a rank, is run once more before it counts.
        """
        self.trials += 1
        reports = self._send(program)
        if _unexpected_dead(program, reports, killed=True) or any(it.state == "hung" for it in reports):
            reports = self._send(program)
        broken = [(rank, report) for rank, report in enumerate(reports) if "broken" in report.answer]
        if broken:
            raise Unjudgeable(f"rank {broken[0][0]}: the suite failed: {broken[0][1].answer['broken']}")
        dead = _unexpected_dead(program, reports)
        if dead:
            raise Died(f"rank {dead[0]} {reports[dead[0]].detail}")
        if any(report.state == "hung" for report in reports):
            raise Hang(program, _hung(reports, program.seconds))
        answers = [report.answer if report.state == "answered" else {"observations": []} for report in reports]
        afterwards = None
        if program.afterwards is not None:
            self.group.end_workers()
            afterwards = self.run(program.afterwards)
        return Trial(place=self.place, program=program, observations=decoded(answers), afterwards=afterwards)

    def _send(self, program: Program) -> list[RankReport]:
        return self.group.run(program.command(self.place), program.seconds)


def _unexpected_dead(program: Program, reports: Sequence[RankReport], killed: bool = False) -> list[int]:
    """The ranks that died without being told to; of these, those ``killed`` from outside."""
    told = {rank for it in program.operations if it["do"] in FATAL for rank in it["ranks"]}
    return [
        rank
        for rank, report in enumerate(reports)
        if report.state == "died" and rank not in told and (report.killed or not killed)
    ]


def _of_denied(verdict: Verdict, clause: Clause, message: str) -> tuple[Verdict, str]:
    """The verdict on a capability that the strategy denies: it must not be there."""
    if verdict == "pass":
        return "fail", f"the strategy denies the capability {clause.capability!r}, and has it; declare it"
    return "pass", f"denied, and not there: {message.splitlines()[0] if message else verdict}"


def _hung(reports: Iterable[RankReport], seconds: float) -> str:
    lines = [f"no answer within {seconds:g} s"]
    for rank, report in enumerate(reports):
        state = f"rank {rank} {report.state}"
        lines.append(state if not report.detail else f"{state}:\n{report.detail}")
    return "\n".join(lines)


def _words(trial: Trial) -> list[list[str]]:
    return [[show(observed) for observed in rank] for rank in trial.observations]


def _first_lines(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:2000]


@contextmanager
def _quiet() -> Iterator[None]:
    """Hypothesis reports the failing example by printing it; the report says it better."""
    from hypothesis.reporting import with_reporter

    with with_reporter(lambda text: None):
        yield
