"""The command line: `run`, `run-engine`, `certificate`, `clauses`, `saboteurs`."""

import json
import os
from pathlib import Path
from time import monotonic
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from lightrft.conformance.certification import Report, Request, certify, processes, selected, setting
from lightrft.conformance.contract import CONTRACT
from lightrft.conformance.judge import ClauseResult
from lightrft.conformance.profiles import PROFILES
from lightrft.conformance.rendering import certificate, failure
from lightrft.conformance.saboteurs.corpus import corpus
from lightrft.conformance.saboteurs.runner import Outcome, run_corpus

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)
CORES = len(os.sched_getaffinity(0))
MARKS = {
    "pass": "green",
    "fail": "bold red",
    "hang": "bold red",
    "error": "bold magenta",
    "skip": "dim",
    "xfail": "yellow",
}


World = Annotated[int, typer.Option("--world-size", min=1, help="Number of ranks")]
Device = Annotated[str, typer.Option(help="cpu or cuda")]
ProfileOption = Annotated[str, typer.Option("--profile", help=", ".join(PROFILES))]
Clauses = Annotated[list[str] | None, typer.Option("--clause", help="Judge only this clause; may be repeated")]
Seed = Annotated[int, typer.Option(help="Seed for drawing programs")]
Settings = Annotated[list[str] | None, typer.Option("--set", help="A setting, NAME=VALUE; may be repeated")]
Expected = Annotated[
    Path | None, typer.Option("--expected", help="TOML file of expected failures", exists=True, dir_okay=False)
]
ReportFile = Annotated[Path | None, typer.Option("--report", help="Write a JSON report to this file")]
"""The options that `run` and `run-engine` share."""


@app.command()
def run(
    strategy: Annotated[str, typer.Argument(help="A registered name, or module:attribute")],
    world: World = 1,
    device: Device = "cpu",
    profile: ProfileOption = "ci",
    clauses: Clauses = None,
    seed: Seed = 0,
    settings: Settings = None,
    expectations: Expected = None,
    report: ReportFile = None,
    jobs: Annotated[
        int | None,
        typer.Option(min=1, help="Clauses to judge at a time; by default one per core for certify and nightly, else 1"),
    ] = None,
) -> None:
    """Certify a strategy. Exit code 0: every MUST holds; 1: at least one does not; 2: the suite could not run it."""
    request = _request(world, device, profile, clauses, seed, settings, expectations, strategy=strategy)
    _run(request, report, jobs or _jobs(profile, world, device))


@app.command()
def run_engine(
    engine: Annotated[str, typer.Argument(help="A registered name, or module:attribute")],
    strategy: Annotated[str, typer.Option(help="The strategy that uses the engine")] = "fake",
    world: World = 1,
    device: Device = "cpu",
    profile: ProfileOption = "ci",
    clauses: Clauses = None,
    seed: Seed = 0,
    settings: Settings = None,
    expectations: Expected = None,
    report: ReportFile = None,
) -> None:
    """Certify a rollout engine with the clauses about engines. Exit codes as for run."""
    _run(
        _request(world, device, profile, clauses, seed, settings, expectations, strategy=strategy, engine=engine),
        report,
    )


def _request(
    world: int, device: str, profile: str, clauses: list[str] | None, seed: int, settings: list[str] | None,
    expectations: Path | None, *, strategy: str, engine: str = "",
) -> Request:  # fmt: skip
    """What the shared options ask for. Raises typer.BadParameter for an unknown profile or an invalid setting."""
    if profile not in PROFILES:
        raise typer.BadParameter(f"--profile: expected one of {', '.join(PROFILES)}, got {profile!r}")
    try:
        parsed = dict(map(setting, settings or []))
    except ValueError as error:
        raise typer.BadParameter(f"--set: {error}") from error
    return Request(
        strategy=strategy, engine=engine, world=world, device=device, profile=profile, clauses=tuple(clauses or ()),
        seed=seed, settings=parsed, expectations=expectations,
    )  # fmt: skip


def _jobs(profile: str, world: int, device: str) -> int:
    """One job per ``world`` cores for profiles that draw enough programs to make up for starting the processes."""
    draws_many = profile in ("certify", "nightly") and device == "cpu"
    return max(1, CORES // world) if draws_many else 1


def _run(request: Request, report: Path | None, jobs: int = 1) -> None:
    console = Console(soft_wrap=True)
    begun = monotonic()
    outcome = _with_progress(console, request, jobs)
    _conclude(console, outcome, monotonic() - begun)
    raise typer.Exit(outcome.exit_code if report is None or _written(console, outcome, report) else 2)


def _written(console: Console, outcome: Report, path: Path) -> bool:
    try:
        path.write_text(json.dumps(outcome.to_json(), indent=1), encoding="utf-8")
    except OSError as error:
        console.print(f"cannot write the report to {path}: {error.strerror}", style="bold magenta", markup=False)
        return False
    return True


def _with_progress(console: Console, request: Request, jobs: int) -> Report:
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
    with processes(jobs) as pool, Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(
            request.engine or request.strategy, total=len(list(selected(request.clauses, engine=bool(request.engine))))
        )

        def tell(result: ClauseResult) -> None:
            progress.advance(task)
            progress.update(task, description=f"{request.engine or request.strategy} {result.id}")
            _show(console, request, result)

        return certify(request, tell, pool)


def _show(console: Console, request: Request, result: ClauseResult) -> None:
    style = MARKS[result.verdict]
    facts = f"{result.examples} programs, {result.seconds:.1f} s" if result.examples else result.message
    console.print(f"[{style}]{result.verdict:5}[/] {result.id:8} {result.level:6} [dim]{facts}[/]", highlight=False)
    if result.verdict in ("fail", "hang", "error"):
        for line in failure(result, CONTRACT[result.id], request).splitlines():
            console.print(f"      {line}", highlight=False, markup=False)


def _conclude(console: Console, outcome: Report, seconds: float) -> None:
    if outcome.unjudged:
        console.print(f"could not be judged: {outcome.unjudged}", style="bold magenta", markup=False, highlight=False)
        return
    counts = {verdict: sum(result.verdict == verdict for result in outcome.results) for verdict in MARKS}
    words = ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)
    console.print(
        f"{outcome.request.engine or outcome.request.strategy} at world size {outcome.request.world}: {words}, in {seconds:.0f} s",
        highlight=False,
    )


@app.command(name="certificate")
def certificate_(
    file: Annotated[Path, typer.Argument(help="A JSON report from run or run-engine", exists=True, dir_okay=False)],
) -> None:
    """Print the certificate of a report, in Markdown."""
    try:
        print(certificate(json.loads(file.read_text(encoding="utf-8"))), end="")
    except (ValueError, KeyError, TypeError) as error:
        raise typer.BadParameter(f"expected a report of lightrft-conformance, got {file}: {error!r}") from error


@app.command()
def saboteurs(
    profile: Annotated[str, typer.Option(help=", ".join(PROFILES))] = "ci",
    seed: Annotated[int, typer.Option(help="Seed for drawing programs")] = 0,
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds, starting at --seed")] = 1,
    only: Annotated[list[str] | None, typer.Option(help="Run only this saboteur; may be repeated")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Number of processes; by default one per core")] = CORES,
) -> None:
    """Test the suite: its own clause must kill each saboteur, and no clause may accuse a control. Exit code 0 or 1."""
    console = Console(soft_wrap=True)
    unknown = set(only or ()) - {entry.name for entry in corpus()}
    if unknown:
        raise typer.BadParameter(f"--only: unknown saboteurs {', '.join(sorted(unknown))}")
    chosen = [entry for entry in corpus() if not only or entry.name in only]
    outcomes = run_corpus(
        chosen, profile, range(seed, seed + seeds), lambda outcome: _show_outcome(console, outcome), jobs
    )
    wrong = {outcome.saboteur.name for outcome in outcomes if not outcome.right}
    defects, controls = ([entry.name for entry in chosen if bool(entry.clause) == kept] for kept in (True, False))
    covered = {entry.clause for entry in corpus()}
    uncovered = [
        clause.id
        for clause in CONTRACT
        if clause.level == "MUST" and clause.id not in covered and not clause.needs_cuda
    ]
    console.print(
        f"{len(set(defects) - wrong)} of {len(defects)} saboteurs killed, {len(set(controls) & wrong)} of {len(controls)} "
        f"controls accused, profile {profile}, {seeds} seed(s); {sum(outcome.conclusive for outcome in outcomes)} killed by "
        f"pinned examples, the same with every seed; MUST clauses without a saboteur: {', '.join(uncovered) or 'none'}",
        highlight=False,
    )
    raise typer.Exit(1 if wrong or uncovered else 0)


def _show_outcome(console: Console, outcome: Outcome) -> None:
    entry = outcome.saboteur
    if entry.clause:
        verdict = "killed" if outcome.killed else "SURVIVED"
    else:
        verdict = "ACCUSED" if outcome.killed else "not accused"
    style, detail = ("green", "") if outcome.right else ("bold red", outcome.reason)
    console.print(
        f"[{style}]{verdict:11}[/] {entry.clause or 'control':8} {entry.name}: {entry.defect} [dim]{detail}[/]",
        highlight=False,
    )


@app.command()
def clauses() -> None:
    """List the clauses of the contract."""
    console = Console(soft_wrap=True)
    for clause in CONTRACT:
        conditions = (
            f"w{clause.smallest_world}"
            + (", cuda" if clause.needs_cuda else "")
            + (f", {clause.capability}" if clause.capability else "")
        )
        console.print(f"{clause.id:8} {clause.level:6} [{conditions}] {clause.text}", highlight=False, markup=False)


if __name__ == "__main__":
    app()
