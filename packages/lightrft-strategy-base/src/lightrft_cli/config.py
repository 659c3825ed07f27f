"""`lightrft config`: show and check configuration files, as `StrategyConfig` reads them."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lightrft_cli.errors import CommandGroup, require_our_packages
from lightrft_cli.output import Json, Value, print_json, print_rows

if TYPE_CHECKING:
    from lightrft.config import StrategyConfig

app = typer.Typer(cls=CommandGroup, rich_markup_mode=None, help="Show and check configuration files.")
File = Annotated[Path, typer.Argument(help="A file of settings: .yaml, .yml, .json or .toml")]


@app.command()
def show(
    file: File,
    everything: Annotated[bool, typer.Option("--all", help="Show settings with their default values too")] = False,
    as_json: Json = False,
) -> None:
    """Show the settings that differ from their defaults."""
    config = _config_class().from_file(file)
    fields = type(config).model_fields
    names = fields if everything else config.changed()
    rows = [
        _row(name, getattr(config, name), fields[name].default, config.owner(name))
        for name in names
        if name != "extra_args"
    ]
    rows += [_row(f"extra_args[{name!r}]", value, None, "trainer") for name, value in config.extra_args.items()]
    print_rows(rows, as_json=as_json, empty="All settings have their default values.")


@app.command()
def check(file: File, as_json: Json = False) -> None:
    """Check a file, and print all errors in it.

    Exit codes: 0, it is valid; 1, a setting is unknown, invalid, or conflicts with another; 2, the file cannot be read.
    """
    config_class = _config_class()
    from lightrft.config import ConfigError

    try:
        config_class.from_file(file)
        errors: tuple[str, ...] = ()
    except ConfigError as error:
        if not error.messages:
            raise
        errors = error.messages
    if as_json:
        print_json({"file": str(file), "valid": not errors, "errors": list(errors)})
    elif not errors:
        typer.echo(f"{file} is valid")
    else:
        typer.echo("\n".join(f"{file}: {message}" for message in errors), err=True)
    raise typer.Exit(1 if errors else 0)


def _config_class() -> "type[StrategyConfig]":
    require_our_packages()
    from lightrft.config import StrategyConfig

    return StrategyConfig


def _row(name: str, value: Value, default: Value, owner: str) -> dict[str, Value]:
    return {"setting": name, "value": value, "default": default, "owner": owner}
