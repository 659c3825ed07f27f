"""A failure as text, with its smallest program."""

import json

from lightrft.conformance.clause import Clause
from lightrft.conformance.judge import ClauseResult
from lightrft.conformance.requests import Request

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
