"""Certify LightRFT strategies and rollout engines against the contract."""

# What takes long to import (torch, hypothesis, the contract) is imported by the command that needs it.

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Annotated

import typer

from lightrft.conformance.options import (
    Clauses,
    ControlsProfile,
    Device,
    Expected,
    ProfileOption,
    ReportFile,
    RunJobs,
    SaboteurJobs,
    Seed,
    Seeds,
    Settings,
    World,
    renderable,
)
from lightrft.conformance.profiles import MOST_PROCESSES
from lightrft_cli.errors import CommandLine
from lightrft_cli.output import on_terminal

if TYPE_CHECKING:
    from rich.console import Console

    from lightrft.conformance.certificates.certificate import Certificate
    from lightrft.conformance.certification import Report
    from lightrft.conformance.judge import ClauseResult
    from lightrft.conformance.requests import Request
    from lightrft.conformance.saboteurs.runner import Outcome

app = typer.Typer(
    help=__doc__,
    cls=CommandLine,
    rich_markup_mode="rich" if on_terminal() else None,  # importing rich takes longer than the rest
)
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
    strategies: Annotated[list[str], typer.Argument(help="Registered names, such as fsdp, or module:attribute")],
    world: World = 1,
    device: Device = "cpu",
    profile: ProfileOption = "ci",
    clauses: Clauses = None,
    seed: Seed = 0,
    settings: Settings = None,
    expectations: Expected = None,
    report: ReportFile = None,
    jobs: RunJobs = None,
) -> None:
    """Certify strategies, one after another. The report of several is a list of their reports.

    Exit codes: 0, every MUST holds; 1, at least one fails; 2, a strategy, or a clause that was asked for, could not be
    judged.
    """
    request = _request(world, device, profile, clauses, seed, settings, expectations, strategy=strategies[0])
    requests = [replace(request, strategy=strategy) for strategy in strategies]
    jobs = jobs or _jobs(profile, world, device)
    if jobs * world > MOST_PROCESSES:
        raise typer.BadParameter(
            f"expected at most {MOST_PROCESSES} processes, got --jobs {jobs} with --world-size {world}. Lower --jobs"
        )
    _run(requests, report, jobs)


@app.command()
def run_engine(
    engine: Annotated[str, typer.Argument(help="Registered name, such as vllm, or module:attribute")],
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
    """Certify a rollout engine with the clauses for engines. Exit codes as for run."""
    request = _request(world, device, profile, clauses, seed, settings, expectations, strategy=strategy, engine=engine)
    _run([request], report)


def _request(
    world: int, device: str, profile: str, clauses: list[str] | None, seed: int, settings: list[str] | None,
    expectations: Path | None, *, strategy: str, engine: str = "",
) -> "Request":  # fmt: skip
    """Build the request. Raises typer.BadParameter for an invalid setting."""
    from lightrft.conformance.requests import Request, setting

    try:
        parsed = dict(map(setting, settings or []))
    except ValueError as error:
        raise typer.BadParameter(f"--set: {error}") from error
    return Request(
        strategy=strategy, engine=engine, world=world, device=device, profile=profile, clauses=tuple(clauses or ()),
        seed=seed, settings=parsed, expectations=expectations,
    )  # fmt: skip


def _jobs(profile: str, world: int, device: str) -> int:
    """Jobs for profiles that draw enough programs to make up for starting the processes.

    One more rank than cores, because ranks wait now and then.
    """
    draws_many = profile in ("certify", "nightly") and device == "cpu"
    return max(1, (CORES + 1) // world) if draws_many else 1


def _run(requests: Sequence["Request"], report: Path | None, jobs: int = 1) -> None:
    """Judge all, unless it is known beforehand that some cannot be judged; then report only these."""
    from rich.console import Console

    from lightrft.conformance.certification import Interrupted, certify
    from lightrft.conformance.requests import impossible

    console = Console(soft_wrap=True)
    outcomes = [certify(request) for request in requests if impossible(request)]
    for outcome in outcomes:
        _conclude(console, outcome, 0)
    try:
        for request in requests if not outcomes else ():
            start = monotonic()
            outcomes.append(_with_progress(console, request, jobs))
            _conclude(console, outcomes[-1], monotonic() - start)
    except KeyboardInterrupt as interruption:
        partial = [*outcomes, interruption.report] if isinstance(interruption, Interrupted) else outcomes
        raise KeyboardInterrupt(_interrupted(partial, report)) from interruption
    exit_code = max(outcome.exit_code for outcome in outcomes)
    raise typer.Exit(exit_code if report is None or _written(outcomes, report) else 2)


def _interrupted(outcomes: Sequence["Report"], path: Path | None) -> str:
    """Write the report of what was judged, if one was asked for; return what to say of it."""
    if not outcomes:
        return "nothing was judged"
    judged = f"{outcomes[-1].request.engine or outcomes[-1].request.strategy} {outcomes[-1].unjudged}"
    return f"{judged}; their report is {path}" if path is not None and _written(outcomes, path) else judged


def _print_error(request: "Request", message: str) -> None:
    """Print one line to stderr, as for an invalid command line."""
    lines = [" ".join(line.split()) for line in message.splitlines() if line.strip()]
    print(f"lightrft-conformance {'run-engine' if request.engine else 'run'}: {'; '.join(lines)}", file=sys.stderr)


def _written(outcomes: Sequence["Report"], path: Path) -> bool:
    reports = [outcome.to_json() for outcome in outcomes]
    try:
        path.write_text(json.dumps(reports[0] if len(reports) == 1 else reports, indent=1), encoding="utf-8")
    except OSError as error:
        _print_error(outcomes[0].request, f"cannot write the report to {path}: {error.strerror}")
        return False
    return True


def _with_progress(console: "Console", request: "Request", jobs: int) -> "Report":
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from lightrft.conformance.certification import certify, processes
    from lightrft.conformance.requests import selected

    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
    shown = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    with processes(jobs, request) as pool, shown as progress:
        task = progress.add_task(
            request.engine or request.strategy, total=len(list(selected(request.clauses, engine=bool(request.engine))))
        )

        def on_result(result: "ClauseResult") -> None:
            progress.advance(task)
            progress.update(task, description=f"{request.engine or request.strategy} {result.id}")
            _show(console, request, result)

        return certify(request, on_result, pool)


def _show(console: "Console", request: "Request", result: "ClauseResult") -> None:
    from lightrft.conformance.contract import CONTRACT
    from lightrft.conformance.rendering import failure

    style = MARKS[result.verdict]
    facts = f"{result.examples} programs, {result.seconds:.1f} s" if result.examples else result.message
    console.print(f"[{style}]{result.verdict:5}[/] {result.id:8} {result.level:6} [dim]{facts}[/]", highlight=False)
    if result.verdict in ("fail", "hang", "error"):
        for line in failure(result, CONTRACT[result.id], request).splitlines():
            console.print(f"      {line}", highlight=False, markup=False)


def _conclude(console: "Console", outcome: "Report", seconds: float) -> None:
    if outcome.unjudged:
        name = outcome.request.engine or outcome.request.strategy
        _print_error(outcome.request, f"{name} could not be judged: {outcome.unjudged}")
        return
    counts = {verdict: sum(result.verdict == verdict for result in outcome.results) for verdict in MARKS}
    words = ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)
    console.print(
        f"{outcome.request.engine or outcome.request.strategy} at world size {outcome.request.world}, profile "
        f"{outcome.request.profile}: {words}, in {seconds:.0f} s",
        highlight=False,
    )


@app.command()
def certificate(
    files: Annotated[list[Path], typer.Argument(help="JSON reports of one strategy or engine, from run or run-engine")],
    outputs: Annotated[
        list[Path] | None,
        typer.Option(
            "--output", help="Write .md, .html, .svg (a badge) or .json; may be repeated. Default: print Markdown",
            callback=renderable,
        ),
    ] = None,
) -> None:  # fmt: skip
    """Combine the reports of one strategy or engine, at any world sizes and on any devices, into a certificate.

    Exit codes: 0, also if it says that clauses do not hold; 2, the files are not reports, or cannot be combined.
    """
    from lightrft.conformance.certificates.formats import FORMATS
    from lightrft.conformance.certificates.reports import combine

    try:
        made = combine(files)
        for output in outputs or ():
            output.write_text(FORMATS[output.suffix](made), encoding="utf-8")
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    print(made.headline if outputs else FORMATS[".md"](made), end="\n" if outputs else "")


@app.command()
def verify(
    files: Annotated[list[Path], typer.Argument(help="Certificates in JSON, as certificate --output writes them")],
) -> None:
    """Tell whether certificates are about the code that is installed, by its digests.

    Exit codes: 0, they are; 1, at least one is about other code, such as an older version; 2, a file is not a certificate, or
    what it is about is not installed.
    """
    from lightrft.conformance.certificates.reports import read

    try:
        differences = {file: _outdated(read(file)) for file in files}
    except (OSError, ValueError, ImportError) as error:
        raise typer.BadParameter(str(error)) from error
    for file, parts in differences.items():
        print(f"{file}: holds for other code; {'; '.join(parts)}" if parts else f"{file}: holds for the installed code")
    raise typer.Exit(1 if any(differences.values()) else 0)


def _outdated(certificate: "Certificate") -> list[str]:
    """A line for each part of the certified code that differs from the installed code. Raises ImportError."""
    from lightrft.conformance.provenance import class_of, digest_of, digest_of_suite

    digests = {"suite": (certificate.suite.digest, digest_of_suite())}
    for part, code in {"strategy": certificate.subject, "engine": certificate.subject.engine}.items():
        if code is not None:
            digests[part] = (code.digest, digest_of(class_of(code.class_name)))
    return [f"{part}: certified {of}, installed {got}" for part, (of, got) in digests.items() if of != got]


@app.command()
def saboteurs(
    profile: ProfileOption = "ci",
    seed: Seed = 0,
    seeds: Seeds = 1,
    only: Annotated[list[str] | None, typer.Option(help="Run only this saboteur; may be repeated")] = None,
    jobs: SaboteurJobs = None,
    controls_profile: ControlsProfile = None,
) -> None:
    """Test the suite itself.

    A saboteur is a strategy or engine with one deliberate defect, which the clause for that defect must detect (kill). A
    control is unusual but correct, and no clause may fail on it. Exit codes: 0, all as expected; 1, otherwise.
    """
    from rich.console import Console

    from lightrft.conformance.contract import CONTRACT
    from lightrft.conformance.saboteurs.corpus import corpus
    from lightrft.conformance.saboteurs.runner import run_corpus

    console = Console(soft_wrap=True)
    unknown = set(only or ()) - {entry.name for entry in corpus()}
    if unknown:
        raise typer.BadParameter(f"--only: unknown saboteurs {', '.join(sorted(unknown))}")
    chosen = [entry for entry in corpus() if not only or entry.name in only]
    outcomes = run_corpus(
        chosen, profile, range(seed, seed + seeds), lambda outcome: _show_outcome(console, outcome), jobs or CORES,
        controls_profile,
    )  # fmt: skip
    wrong = {outcome.saboteur.name for outcome in outcomes if not outcome.right}
    defects, controls = ([entry.name for entry in chosen if bool(entry.clause) == kept] for kept in (True, False))
    covered = {entry.clause for entry in corpus()}
    uncovered = [
        clause.id
        for clause in CONTRACT
        if clause.level == "MUST" and clause.id not in covered and not clause.needs_cuda
    ]
    controls_with = f" (controls: {controls_profile})" if controls_profile else ""
    console.print(
        f"{len(set(defects) - wrong)} of {len(defects)} saboteurs killed, {len(set(controls) & wrong)} of {len(controls)} "
        f"controls accused, profile {profile}{controls_with}, {seeds} seed(s); {sum(outcome.conclusive for outcome in outcomes)} killed by "
        f"pinned examples, with any seed; MUST clauses without a saboteur: {', '.join(uncovered) or 'none'}",
        highlight=False,
    )
    raise typer.Exit(1 if wrong or uncovered else 0)


def _show_outcome(console: "Console", outcome: "Outcome") -> None:
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
    from rich.console import Console

    from lightrft.conformance.contract import CONTRACT

    console = Console(soft_wrap=True)
    for clause in CONTRACT:
        conditions = (
            f"world {clause.smallest_world}"
            + (", cuda" if clause.needs_cuda else "")
            + (f", {clause.capability}" if clause.capability else "")
        )
        console.print(f"{clause.id:8} {clause.level:6} [{conditions}] {clause.text}", highlight=False, markup=False)


if __name__ == "__main__":
    app()
