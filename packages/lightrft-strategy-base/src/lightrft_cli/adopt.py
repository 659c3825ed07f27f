"""`lightrft adopt`: see `adoption`."""

from pathlib import Path
from typing import Annotated

import typer

from lightrft_cli import adoption
from lightrft_cli.errors import CommandError


def adopt(
    path: Annotated[Path | None, typer.Argument(help="The clone: the directory that contains lightrft/trainer")] = None,
    undo: Annotated[bool, typer.Option("--undo", help="Restore the environment")] = False,
    status: Annotated[bool, typer.Option("--status", help="Print the adopted clone")] = False,
) -> None:
    """Run a clone of LightRFT on this layer, without changing its files.

    In this environment, lightrft.strategy then comes from this layer, and the other subpackages from the clone.
    """
    if (path is not None) + undo + status != 1:
        raise CommandError("expected PATH, --undo or --status, got none or several of them. Run: lightrft adopt --help")
    try:
        if path is not None:
            typer.echo(f"adopted {adoption.adopt(path)}")
        elif undo:
            typer.echo(f"no longer adopted: {adoption.undo()}")
        else:
            typer.echo(adoption.adopted_clone() or "no clone is adopted")
    except adoption.AdoptError as error:
        raise CommandError(str(error)) from error
