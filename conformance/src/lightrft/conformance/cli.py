"""The command line: `run`, `run-engine`, `certificate`, `clauses`, `saboteurs`."""

import json
import os
from pathlib import Path
from time import monotonic
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from lightrft.conformance.certification import Report, Request, certify, processes, selected, setting
from lightrft.conformance.contract import CONTRACT
from lightrft.conformance.judge import ClauseResult
from lightrft.conformance.profiles import PROFILES
from lightrft.conformance.rendering import certificate, failure
from lightrft.conformance.saboteurs.catalogue import corpus
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


@app.command()
def run(
    strategy: Annotated[str, typer.Argument(help="Registered name, or module:attribute")],
    world_size: Annotated[int, typer.Option(min=1, help="Ranks")] = 1,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    profile: Annotated[str, typer.Option(help=", ".join(PROFILES))] = "ci",
    clause: Annotated[list[str] | None, typer.Option(help="Only this clause; may be repeated")] = None,
    seed: Annotated[int, typer.Option(help="Of the programs that are drawn")] = 0,
    set_: Annotated[list[str] | None, typer.Option("--set", help="A setting, NAME=VALUE; may be repeated")] = None,
    expected: Annotated[
        Path | None, typer.Option(help="TOML file of expected failures", exists=True, dir_okay=False)
    ] = None,
    report: Annotated[Path | None, typer.Option(help="Write the outcome as JSON")] = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Clauses at a time; by default several where many programs are drawn")
    ] = None,
) -> None:
    """Judge a strategy by the contract. Exit 0: every MUST holds; 1: some do not; 2: it could not be judged."""
    _run(
        Request(
            strategy=strategy, world=world_size, device=device, profile=profile, clauses=tuple(clause or ()), seed=seed,
            settings=_settings(set_), expectations=expected,
        ),
        report,
        jobs or _jobs(profile, world_size, device),
    )  # fmt: skip


@app.command()
def run_engine(
    engine: Annotated[str, typer.Argument(help="Registered name, or module:attribute")],
    strategy: Annotated[str, typer.Option(help="The strategy that it generates for")] = "fake",
    world_size: Annotated[int, typer.Option(min=1, help="Ranks")] = 1,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    profile: Annotated[str, typer.Option(help=", ".join(PROFILES))] = "ci",
    clause: Annotated[list[str] | None, typer.Option(help="Only this clause; may be repeated")] = None,
    seed: Annotated[int, typer.Option(help="Of the programs that are drawn")] = 0,
    set_: Annotated[list[str] | None, typer.Option("--set", help="A setting, NAME=VALUE; may be repeated")] = None,
    expected: Annotated[
        Path | None, typer.Option(help="TOML file of expected failures", exists=True, dir_okay=False)
    ] = None,
    report: Annotated[Path | None, typer.Option(help="Write the outcome as JSON")] = None,
) -> None:
    """Judge a rollout engine by the clauses that speak of engines. Exit codes as for run."""
    _run(
        Request(
            strategy=strategy, world=world_size, device=device, profile=profile, clauses=tuple(clause or ()), seed=seed,
            settings=_settings(set_), expectations=expected, engine=engine,
        ),
        report,
    )  # fmt: skip


def _jobs(profile: str, world: int, device: str) -> int:
    """As many as there are cores for, where the programs to be drawn are worth the time in which processes start."""
    many = profile in ("certify", "nightly") and device == "cpu"
    return max(1, CORES // world) if many else 1


def _settings(given: list[str] | None) -> dict[str, Any]:
    try:
        return dict(map(setting, given or []))
    except ValueError as error:
        raise typer.BadParameter(f"--set {error}") from error


def _run(request: Request, report: Path | None, jobs: int = 1) -> None:
    if request.profile not in PROFILES:
        raise typer.BadParameter(f"--profile {request.profile}: there are {', '.join(PROFILES)}")
    console = Console(soft_wrap=True)
    begun = monotonic()
    outcome = _with_progress(console, request, jobs)
    _conclude(console, outcome, monotonic() - begun)
    raise typer.Exit(outcome.exit_code if report is None or _written(console, outcome, report) else 2)


def _written(console: Console, outcome: Report, path: Path) -> bool:
    try:
        path.write_text(json.dumps(outcome.to_json(), indent=1), encoding="utf-8")
    except OSError as error:
        console.print(f"the report cannot be written: {path}: {error.strerror}", style="bold magenta", markup=False)
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
    counts = {verdict: sum(it.verdict == verdict for it in outcome.results) for verdict in MARKS}
    words = ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)
    console.print(
        f"{outcome.request.engine or outcome.request.strategy} at world size {outcome.request.world}: {words}, in {seconds:.0f} s",
        highlight=False,
    )


@app.command(name="certificate")
def certificate_(
    file: Annotated[Path, typer.Argument(help="A report written by run or run-engine", exists=True, dir_okay=False)],
) -> None:
    """Turn a report into a certificate in Markdown, on standard output."""
    try:
        print(certificate(json.loads(file.read_text(encoding="utf-8"))), end="")
    except (ValueError, KeyError, TypeError) as error:
        raise typer.BadParameter(f"{file} is no report of lightrft-conformance: {error!r}") from error


@app.command()
def saboteurs(
    profile: Annotated[str, typer.Option(help=", ".join(PROFILES))] = "ci",
    seed: Annotated[int, typer.Option(help="Of the programs that are drawn")] = 0,
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds, from --seed on")] = 1,
    only: Annotated[list[str] | None, typer.Option(help="Only this saboteur; may be repeated")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Processes; by default one a core")] = CORES,
) -> None:
    """Judge the suite: every saboteur must be killed by its own clause, no control accused. Exit 0 or 1."""
    console = Console(soft_wrap=True)
    strange = set(only or ()) - {it.name for it in corpus()}
    if strange:
        raise typer.BadParameter(f"--only {', '.join(sorted(strange))}: there is no such saboteur")
    chosen = [it for it in corpus() if not only or it.name in only]
    outcomes = run_corpus(chosen, profile, range(seed, seed + seeds), lambda it: _show_outcome(console, it), jobs)
    wrong = [it for it in outcomes if not it.right]
    covered = {it.clause for it in chosen if it.clause}
    bare = [
        clause.id
        for clause in CONTRACT
        if clause.level == "MUST" and clause.id not in covered and not clause.needs_cuda
    ]
    killed = sum(it.clause != "" for it in chosen) - len({it.saboteur.name for it in wrong if it.saboteur.clause})
    console.print(
        f"{killed} of {sum(it.clause != '' for it in chosen)} saboteurs killed, "
        f"{len({it.saboteur.name for it in wrong if not it.saboteur.clause})} of {sum(it.clause == '' for it in chosen)} controls "
        f"accused, profile {profile}, {seeds} seed(s), {sum(it.settled for it in outcomes)} killed by witnesses, which no "
        f"seed changes; MUST clauses without a saboteur: {', '.join(bare) or 'none'}",
        highlight=False,
    )
    raise typer.Exit(1 if wrong or (bare and not only) else 0)


def _show_outcome(console: Console, outcome: Outcome) -> None:
    it = outcome.saboteur
    word = ("killed" if outcome.killed else "SURVIVED") if it.clause else ("ACCUSED" if outcome.killed else "at peace")
    style = "green" if outcome.right else "bold red"
    detail = "" if outcome.right else outcome.reason
    console.print(
        f"[{style}]{word:8}[/] {it.clause or 'control':8} {it.name}: {it.defect} [dim]{detail}[/]", highlight=False
    )


@app.command()
def clauses() -> None:
    """List the contract."""
    console = Console(soft_wrap=True)
    for clause in CONTRACT:
        teeth = (
            f"w{clause.smallest_world}"
            + (", cuda" if clause.needs_cuda else "")
            + (f", {clause.capability}" if clause.capability else "")
        )
        console.print(f"{clause.id:8} {clause.level:6} [{teeth}] {clause.text}", highlight=False, markup=False)


if __name__ == "__main__":
    app()
