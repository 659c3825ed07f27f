"""What listing commands print: a rich table on a terminal, aligned columns otherwise, or JSON."""

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Annotated

import typer

Value = str | int | float | bool | None | Sequence["Value"] | Mapping[str, "Value"]
Row = Mapping[str, Value]
Json = Annotated[bool, typer.Option("--json", help="Print JSON")]


def on_terminal() -> bool:
    """Return whether the output is a terminal; Python has no output object if it was closed, as by ``>&-``."""
    return sys.stdout is not None and sys.stdout.isatty()


def print_json(value: Value) -> None:
    """Print ``value``."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


def print_rows(rows: Sequence[Row], *, as_json: bool, empty: str = "") -> None:
    """Print a table whose columns are the keys of ``rows``.

    Args:
        rows: All with the same keys.
        as_json: Print a list of objects instead.
        empty: The line to print if there are no rows.
    """
    if as_json:
        print_json(rows)
    elif not rows:
        typer.echo(empty)
    elif on_terminal():
        _print_rich(rows)
    else:
        cells = [list(rows[0]), *([shown(value) for value in row.values()] for row in rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        for line in cells:
            typer.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _print_rich(rows: Sequence[Row]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in rows[0]:
        table.add_column(name, overflow="fold")  # a command or a path is never cut
    for row in rows:
        table.add_row(*(Text(shown(value)) for value in row.values()))
    Console().print(table)


def shown(value: Value) -> str:
    """Return the text of a cell."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(shown, value))
    return str(value)


def size(nbytes: float) -> str:
    """Return a number of bytes as text, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} TB"


def print_facts(facts: Row) -> None:
    """Print names and values, one per line; a mapping as `name value, name value`."""
    width = max(map(len, facts))
    for name, value in facts.items():
        text = (
            ", ".join(f"{key} {shown(item)}" for key, item in value.items())
            if isinstance(value, Mapping)
            else shown(value)
        )
        typer.echo(f"{name.ljust(width)}  {text}".rstrip())
