"""Running the corpus: each saboteur against the clause that must kill it, each control against all."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from multiprocessing.util import Finalize
from types import FunctionType

from lightrft.conformance.certification import Certification
from lightrft.conformance.contract import CONTRACT
from lightrft.conformance.driver.worker_group import WorkerGroup
from lightrft.conformance.judge import ClauseResult, Unjudgeable
from lightrft.conformance.process_pool import process_pool
from lightrft.conformance.requests import Request
from lightrft.conformance.saboteurs.catalogue import Saboteur

INNERMOST = re.compile(r'most recent call first\):\s+File "(.+)", line (\d+)')
"""The file and the line that a thread was at, in a stack of faulthandler."""
TOGETHER = 8
"""Saboteurs that use the same workers, one after another."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The result of one saboteur or control."""

    saboteur: Saboteur
    killed: bool
    """Whether its own clause gave the expected verdict, because of the defect; for a control, whether it was accused."""
    results: Sequence[ClauseResult]

    @property
    def right(self) -> bool:
        """A saboteur must be killed; a control must not."""
        return self.killed == bool(self.saboteur.clause)

    @property
    def conclusive(self) -> bool:
        """Whether another seed would find the same: a pinned example killed it."""
        return self.right and bool(self.saboteur.clause) and self.results[0].pinned

    @property
    def reason(self) -> str:
        """The first verdict that is not a pass, in one line."""
        shown = [result for result in self.results if result.verdict not in ("pass", "skip")] or list(self.results)
        first = shown[0]
        message = first.message.splitlines()[0] if first.message else ""
        elsewhere = first.verdict == self.saboteur.verdict == "hang" and not self.killed
        return f"{first.id} {first.verdict}: {message}{', but not in the saboteur' if elsewhere else ''}"


def run_corpus(
    chosen: Sequence[Saboteur], profile: str, seeds: Iterable[int],
    on_outcome: Callable[[Outcome], None] = lambda outcome: None, jobs: int = 1, controls_profile: str | None = None,
) -> list[Outcome]:  # fmt: skip
    """Run ``chosen`` with each seed, in ``jobs`` processes; call ``on_outcome`` with each outcome.

    Controls run all clauses, and take as long as hundreds of saboteurs: ``controls_profile`` is theirs, if it is not ``profile``.
    A saboteur that a pinned example kills runs with the first seed only, because no seed changes a pinned example.
    """
    outcomes: list[Outcome] = []
    with process_pool(jobs) as pool:
        for seed in seeds:
            profiles = {True: profile, False: controls_profile or profile}
            of_seed: list[Outcome] = []
            for done in as_completed(
                [pool.submit(_run_together, batch, profiles[bool(batch[0].clause)], seed) for batch in _batches(chosen)]
            ):
                for outcome in done.result():
                    of_seed.append(outcome)
                    on_outcome(outcome)
            outcomes += of_seed
            chosen = [outcome.saboteur for outcome in of_seed if not outcome.conclusive]
    return outcomes


def _batches(chosen: Sequence[Saboteur]) -> Iterator[tuple[Saboteur, ...]]:
    """Yield the slowest, those that hang and controls, one by one; then batches of one world size."""
    slow = [each for each in chosen if not each.clause or each.verdict == "hang"]
    yield from ((each,) for each in sorted(slow, key=lambda each: each.verdict != "hang"))
    for world in sorted({each.world for each in chosen}):
        others = [each for each in chosen if each not in slow and each.world == world]
        yield from (tuple(others[start : start + TOGETHER]) for start in range(0, len(others), TOGETHER))


def _run_together(chosen: Sequence[Saboteur], profile: str, seed: int) -> list[Outcome]:
    """Run ``chosen``, all of one world size, with the same workers."""
    group = _group_here(chosen[0].world)
    try:
        return [run_one(each, group, profile, seed) for each in chosen]
    finally:
        group.end_workers()


@cache
def _group_here(world: int) -> WorkerGroup:
    """Return the workers of this process; their processes end after each batch."""
    group = WorkerGroup(world, ranks=world > 1)
    Finalize(None, group.close, exitpriority=10)
    return group


def run_one(saboteur: Saboteur, group: WorkerGroup, profile: str, seed: int) -> Outcome:
    """Judge a saboteur by its own clause, a control by all clauses."""
    request = Request(
        strategy="fake" if saboteur.engine else saboteur.target,
        engine=saboteur.target if saboteur.engine else "",
        world=saboteur.world,
        profile=profile,
        settings=saboteur.settings,
        seed=seed,
        deadline_factor=0.2 if saboteur.verdict == "hang" else 1.0,
    )
    certification = Certification(request)
    clauses = [CONTRACT[saboteur.clause]] if saboteur.clause else list(CONTRACT)
    try:
        certification.open(group)
        results = [certification.judge(clause) for clause in clauses]
    except Unjudgeable as error:
        results = [ClauseResult(id=saboteur.clause or "-", level="MUST", verdict="error", message=str(error))]
    return Outcome(saboteur=saboteur, killed=any(_kills(saboteur, result) for result in results), results=results)


def _kills(saboteur: Saboteur, result: ClauseResult) -> bool:
    """Whether a result shows the defect of a saboteur, or accuses a control."""
    if not saboteur.clause:
        return result.verdict in ("fail", "hang", "error")
    return result.verdict == saboteur.verdict and (result.verdict != "hang" or hangs_in(saboteur, result.message))


def hangs_in(saboteur: Saboteur, message: str) -> bool:
    """Whether a thread in the stacks of ``message`` is at a line of the saboteur itself.

    On a slow machine, any other call may miss the deadline.
    """
    module, _, name = saboteur.target.partition(":")
    functions = vars(getattr(import_module(module), name)).values()
    codes = [function.__code__ for function in functions if isinstance(function, FunctionType)]
    lines = {(code.co_filename, str(line)) for code in codes for _, _, line in code.co_lines()}
    return not lines.isdisjoint(INNERMOST.findall(message))
