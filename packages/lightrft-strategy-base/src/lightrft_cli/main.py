"""`lightrft`: the commands, one file each. Slow imports are done by the command that needs them."""

from typing import Annotated

import typer

from lightrft_cli import checkpoint, config
from lightrft_cli.adopt import adopt
from lightrft_cli.convert import convert
from lightrft_cli.doctor import doctor
from lightrft_cli.errors import CommandGroup
from lightrft_cli.output import on_terminal
from lightrft_cli.registered import engines, strategies
from lightrft_cli.requirements import our_packages

app = typer.Typer(
    cls=CommandGroup,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich" if on_terminal() else None,  # importing rich takes longer than the rest
)


def _print_versions(value: bool) -> None:
    if value:
        for name, version in versions().items():
            typer.echo(f"{name} {version}")
        raise typer.Exit


def versions() -> dict[str, str]:
    """Return the versions of the installed packages of this project, by name."""
    return {installed.name: installed.version for installed in our_packages()}


@app.callback()
def lightrft(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_versions, is_eager=True, help="Print the packages' versions")
    ] = False,
) -> None:
    """Check installations, configuration files and checkpoints, convert checkpoints, and adopt clones of LightRFT."""


app.command()(doctor)
app.command()(strategies)
app.command()(engines)
app.add_typer(config.app, name="config")
app.add_typer(checkpoint.app, name="checkpoint")
app.command()(convert)
app.command()(adopt)
