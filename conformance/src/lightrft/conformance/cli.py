"""The command line: run, certificate, clauses."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from lightrft.conformance.certification import Report, Request, certify, selected
from lightrft.conformance.contract import CONTRACT
from lightrft.conformance.judge import ClauseResult
from lightrft.conformance.profiles import PROFILES

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)
MARKS = {
    "pass": "green",
    "fail": "bold red",
    "hang": "bold red",
    "error": "bold magenta",
    "skip": "dim",
    "xfail": "yellow",
}


def _setting(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise typer.BadParameter(f"{text!r}: write NAME=VALUE")
    try:
        return name, json.loads(value.lower() if value in ("True", "False", "None") else value)
    except json.JSONDecodeError:
        return name, value


@app.command()
def run(
    strategy: Annotated[str, typer.Argument(help="Registered name, or module:attribute")],
    world_size: Annotated[int, typer.Option(min=1, help="Ranks")] = 1,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    profile: Annotated[str, typer.Option(help=", ".join(PROFILES))] = "ci",
    clause: Annotated[list[str] | None, typer.Option(help="Only this clause; may be repeated")] = None,
    seed: Annotated[int, typer.Option(help="Of the programs that are drawn")] = 0,
    set_: Annotated[list[str] | None, typer.Option("--set", help="A setting, NAME=VALUE; may be repeated")] = None,
    expected: Annotated[Path | None, typer.Option(help="TOML file of expected failures")] = None,
    report: Annotated[Path | None, typer.Option(help="Write the outcome as JSON")] = None,
) -> None:
    """Judge a strategy by the contract. Exit 0: every MUST holds; 1: some do not; 2: it could not be judged."""
    if profile not in PROFILES:
        raise typer.BadParameter(f"--profile {profile}: there are {', '.join(PROFILES)}")
    request = Request(
        strategy=strategy, world=world_size, device=device, profile=profile, clauses=tuple(clause or ()), seed=seed,
        settings=dict(map(_setting, set_ or [])), expectations=expected,
    )  # fmt: skip
    console = Console(soft_wrap=True)
    outcome = _with_progress(console, request)
    if report is not None:
        report.write_text(json.dumps(outcome.to_json(), indent=1), encoding="utf-8")
    _conclude(console, outcome)
    raise typer.Exit(outcome.exit_code)


def _with_progress(console: Console, request: Request) -> Report:
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(request.strategy, total=len(list(selected(request.clauses))))

        def tell(result: ClauseResult) -> None:
            progress.advance(task)
            progress.update(task, description=f"{request.strategy} {result.id}")
            _show(console, request, result)

        return certify(request, tell)


def _show(console: Console, request: Request, result: ClauseResult) -> None:
    style = MARKS[result.verdict]
    facts = f"{result.examples} programs, {result.seconds:.1f} s" if result.examples else result.message
    console.print(f"[{style}]{result.verdict:5}[/] {result.id:8} {result.level:6} [dim]{facts}[/]", highlight=False)
    if result.verdict not in ("fail", "hang", "error"):
        return
    console.print(f"      the contract: {CONTRACT[result.id].text}", highlight=False, markup=False)
    for line in result.message.splitlines():
        console.print(f"      {line}", style=style, highlight=False, markup=False)
    if result.program is not None:
        _show_program(console, result)
    console.print(f"      to repeat: {request.command(result.id)}", highlight=False, markup=False)


def _show_program(console: Console, result: ClauseResult) -> None:
    assert result.program is not None
    console.print(f"      settings: {json.dumps(result.program['settings'])}", highlight=False, markup=False)
    for index, operation in enumerate(result.program["operations"]):
        arguments = ", ".join(f"{key}={value}" for key, value in operation.items() if key != "do")
        console.print(f"      {index:3} {operation['do']}({arguments})", highlight=False, markup=False)
        for rank, seen in enumerate(result.observations or []):
            if index < len(seen) and seen[index] != "None":
                console.print(f"            rank {rank}: {seen[index]}", style="dim", highlight=False, markup=False)


def _conclude(console: Console, outcome: Report) -> None:
    if outcome.unjudged:
        console.print(f"could not be judged: {outcome.unjudged}", style="bold magenta", markup=False, highlight=False)
        return
    counts = {verdict: sum(it.verdict == verdict for it in outcome.results) for verdict in MARKS}
    words = ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)
    seconds = sum(it.seconds for it in outcome.results)
    console.print(
        f"{outcome.request.strategy} at world size {outcome.request.world}: {words}, in {seconds:.0f} s",
        highlight=False,
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
