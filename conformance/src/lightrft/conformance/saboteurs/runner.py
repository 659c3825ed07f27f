"""Running the corpus: each saboteur against the clause that must kill it, each control against all."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from multiprocessing import get_context
from multiprocessing.util import Finalize

from lightrft.conformance.certification import Certification, Request
from lightrft.conformance.contract import CONTRACT
from lightrft.conformance.driver.group import WorkerGroup
from lightrft.conformance.judge import ClauseResult, Unjudgeable
from lightrft.conformance.saboteurs.catalogue import Saboteur

TOGETHER = 8
"""Saboteurs that use the same workers, one after another."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one saboteur or control."""

    saboteur: Saboteur
    killed: bool
    """By its own clause, with the verdict expected; for a control, whether it was accused."""
    results: Sequence[ClauseResult]

    @property
    def right(self) -> bool:
        """A saboteur must be killed; a control must not."""
        return self.killed == bool(self.saboteur.clause)

    @property
    def settled(self) -> bool:
        """Whether another seed would find the same: a pinned witness killed it."""
        return self.right and bool(self.saboteur.clause) and self.results[0].pinned

    @property
    def reason(self) -> str:
        """What was seen, in a line."""
        shown = [it for it in self.results if it.verdict not in ("pass", "skip")] or list(self.results)
        first = shown[0]
        return f"{first.id} {first.verdict}: {first.message.splitlines()[0] if first.message else ''}"


def run_corpus(
    chosen: Sequence[Saboteur], profile: str, seeds: Iterable[int],
    tell: Callable[[Outcome], None] = lambda outcome: None, jobs: int = 1,
) -> list[Outcome]:  # fmt: skip
    """Run ``chosen`` with each seed, in ``jobs`` processes; ``tell`` hears of each as it is done.

    A saboteur that a pinned witness kills is run with the first seed only: no seed changes a witness.
    """
    outcomes: list[Outcome] = []
    with ProcessPoolExecutor(jobs, mp_context=get_context("fork")) as pool:
        for seed in seeds:
            run = partial(_run_together, profile=profile, seed=seed)
            found: list[Outcome] = []
            for done in as_completed([pool.submit(run, together) for together in _batches(chosen)]):
                for outcome in done.result():
                    found.append(outcome)
                    tell(outcome)
            outcomes += found
            chosen = [it.saboteur for it in found if not it.settled]
    return outcomes


def _batches(chosen: Sequence[Saboteur]) -> Iterator[tuple[Saboteur, ...]]:
    """What takes longest one by one, controls and those that hang; then a few of the same world size at a time."""
    long = [it for it in chosen if not it.clause or it.verdict == "hang"]
    yield from ((it,) for it in sorted(long, key=lambda it: it.verdict != "hang"))
    for world in sorted({it.world for it in chosen}):
        these = [it for it in chosen if it not in long and it.world == world]
        yield from (tuple(these[start : start + TOGETHER]) for start in range(0, len(these), TOGETHER))


def _run_together(chosen: Sequence[Saboteur], profile: str, seed: int) -> list[Outcome]:
    """Run ``chosen``, which are of one world size, with the same workers."""
    group = _group_here(chosen[0].world)
    try:
        return [run_one(it, group, profile, seed) for it in chosen]
    finally:
        group.end_workers()


@cache
def _group_here(world: int) -> WorkerGroup:
    """This process's own, whose workers are soon started anew."""
    group = WorkerGroup(world, ranks=world > 1)
    Finalize(None, group.close, exitpriority=10)
    return group


def run_one(saboteur: Saboteur, group: WorkerGroup, profile: str, seed: int) -> Outcome:
    """Judge one by its own clause, a control by all."""
    request = Request(
        strategy="fake" if saboteur.engine else saboteur.target,
        engine=saboteur.target if saboteur.engine else "",
        world=saboteur.world,
        profile=profile,
        settings=saboteur.settings,
        seed=seed,
    )
    certification = Certification(request)
    clauses = [CONTRACT[saboteur.clause]] if saboteur.clause else list(CONTRACT)
    with _unjudged_is_an_error(saboteur) as failed:
        certification.open(group)
        results = [certification.judge(clause) for clause in clauses]
        failed.extend(results)
    if saboteur.clause:
        return Outcome(saboteur=saboteur, killed=failed[0].verdict == saboteur.verdict, results=failed)
    accused = any(it.verdict in ("fail", "hang", "error") for it in failed)
    return Outcome(saboteur=saboteur, killed=accused, results=failed)


@contextmanager
def _unjudged_is_an_error(saboteur: Saboteur) -> Iterator[list[ClauseResult]]:
    results: list[ClauseResult] = []
    try:
        yield results
    except Unjudgeable as error:
        results.append(ClauseResult(id=saboteur.clause or "-", level="MUST", verdict="error", message=str(error)))
