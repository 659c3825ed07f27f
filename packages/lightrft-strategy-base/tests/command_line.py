"""Runs `lightrft` in this process, for the tests of the commands."""

import json

from typer.testing import CliRunner

from lightrft_cli.main import app


def lightrft(*arguments, code=0):
    """What the command prints: its output if it must succeed, else its errors too."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="lightrft")
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result.output if code else result.stdout


def refused(*arguments):
    """The one line on stderr of a command that cannot be carried out."""
    said = lightrft(*arguments, code=2)
    assert said.count("\n") == 1, said
    return said.strip()


def listed(*arguments, code=0):
    """The value that the command prints as JSON."""
    return json.loads(lightrft(*arguments, "--json", code=code))
