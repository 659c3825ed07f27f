"""Results as text: a failure with its smallest program, and the certificate."""

import json
from collections import Counter

from lightrft.conformance.certification import Request
from lightrft.conformance.clause import Clause
from lightrft.conformance.judge import ClauseResult
from lightrft.conformance.values import Record

LONGEST = 60
"""The most operations of a program to show."""


def failure(result: ClauseResult, clause: Clause, request: Request) -> str:
    """The clause, what was observed in which program on which rank, and how to repeat it."""
    lines = [f"contract: {clause.text}", *result.message.splitlines()]
    if result.program is not None:
        lines.append(f"settings: {json.dumps(result.program['settings'])}")
        lines += _program(result)
    if result.pinned_example:
        lines += [f"pinned example to add to {type(clause).__name__}.pinned_examples:", f"    {result.pinned_example},"]
    lines.append(f"repeat with: {request.command(result.id)}")
    return "\n".join(lines)


def _program(result: ClauseResult) -> list[str]:
    assert result.program is not None
    lines = []
    ran = max((len(rank) for rank in result.observations or []), default=0)
    for index, operation in enumerate(result.program["operations"]):
        if index >= LONGEST or (ran and index >= ran):
            lines.append(f"    ... {len(result.program['operations']) - index} more operations")
            break
        arguments = ", ".join(f"{key}={value}" for key, value in operation.items() if key != "do")
        lines.append(f"{index:3} {operation['do']}({arguments})")
        lines += _side_by_side([rank[index] if index < len(rank) else "nothing" for rank in result.observations or []])
    return lines


def _side_by_side(seen: list[str]) -> list[str]:
    """What the ranks observed; one line if they agree."""
    if not seen or set(seen) == {"None"}:
        return []
    if len(set(seen)) == 1:
        return [f"        {'every rank' if len(seen) > 1 else 'rank 0'}: {seen[0]}"]
    return [f"        rank {rank}: {text}" for rank, text in enumerate(seen)]


def certificate(report: Record) -> str:
    """Render a report as a Markdown certificate."""
    strategy, environment = report["strategy"], report["environment"]
    counts = Counter((clause["level"], clause["verdict"]) for clause in report["clauses"])
    holds = report["exit_code"] == 0
    settings = ", ".join(f"`{name}={value}`" for name, value in strategy["settings"].items())
    lines = [
        f"# {'Certificate' if holds else 'Not certified'}: {_title(strategy)}",
        "",
        _verdict(report),
        "",
        "| | |",
        "|---|---|",
        f"| strategy | `{strategy.get('class', '')}` |",
        f"| distribution of the strategy | {_origin(strategy)} |",
        *_engine_rows(strategy.get("engine")),
        f"| settings | {settings or 'defaults'} |",
        f"| capabilities | {', '.join(strategy.get('capabilities', [])) or 'none beyond the contract'} |",
        f"| world size, device | {report['world_size']}, {report['device']} |",
        f"| profile, seed | {report['profile']}, {report['seed']} |",
        f"| suite, contract | {report['suite']}, {report['contract']} |",
        f"| python, torch | {environment['python']}, {environment['torch']} |",
        f"| machine | {environment['platform']}, {environment['processors']} processors, {environment['gpus']} GPUs |",
        f"| date | {environment['date']} |",
        f"| repeat with | `{report['reproduce']}` |",
        "",
        f"{_count(counts, 'MUST')}; {_count(counts, 'SHOULD')}.",
        "",
        "| clause | level | verdict | programs | remark |",
        "|---|---|---|---:|---|",
    ]
    for clause in report["clauses"]:
        remark = clause["message"].splitlines()[0].replace("|", "\\|") if clause["message"] else ""
        lines.append(f"| {clause['id']} | {clause['level']} | {clause['verdict']} | {clause['examples']} | {remark} |")
    return "\n".join(lines) + "\n"


def _title(strategy: Record) -> str:
    engine = strategy.get("engine")
    return str(strategy["name"]) if engine is None else f"{engine['class'].rpartition('.')[2]} for {strategy['name']}"


def _origin(origin: Record) -> str:
    """The distribution and its version, or the source file of code without a distribution."""
    if not origin.get("distribution"):
        return f"none; {origin.get('source') or 'unknown source'}"
    needs = ", ".join(f"{name} {version}" for name, version in origin.get("requirements", {}).items())
    return f"{origin['distribution']} {origin['version']}" + (f" (with {needs})" if needs else "")


def _engine_rows(engine: Record | None) -> list[str]:
    if engine is None:
        return []
    return [f"| engine | `{engine['class']}` |", f"| distribution of the engine | {_origin(engine)} |"]


def _verdict(report: Record) -> str:
    if report["unjudged"]:
        return f"Could not be judged: {report['unjudged'].splitlines()[0]}"
    if report["exit_code"] == 0:
        return f"Every MUST of the contract that applies at world size {report['world_size']} holds."
    failed = [
        clause["id"]
        for clause in report["clauses"]
        if clause["level"] == "MUST" and clause["verdict"] in ("fail", "hang", "error")
    ]
    return f"These MUST clauses do not hold: {', '.join(failed)}."


def _count(counts: Counter[tuple[str, str]], level: str) -> str:
    parts = [f"{number} {verdict}" for (of, verdict), number in sorted(counts.items()) if of == level]
    return f"{level}: {', '.join(parts) or 'none'}"
