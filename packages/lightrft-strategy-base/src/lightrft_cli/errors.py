"""How commands fail: one line on stderr and exit code 2, never a traceback.

The line has the command, what it expected, what it got and the remedy. Exit code 1 means that a
command that checks something found it invalid.
"""

import errno
import sys
from pathlib import Path
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup
from typing_extensions import override

from lightrft_cli.adoption import hiding_package
from lightrft_cli.interruption import interruptible

INVALID_USAGE: Any = typer.BadParameter.__base__  # typer has its own copy of click, or depends on it


class CommandError(Exception):
    """A command cannot be carried out; the message says why and what to do."""


class CommandLine(TyperGroup):
    """A group of commands that reports an invalid command line in one line. Without arguments it prints its help."""

    @override
    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, args if args or ctx.resilient_parsing else ["--help"])

    @override
    def main(self, *args: Any, **more: Any) -> Any:
        program = str(more.get("prog_name") or Path(sys.argv[0]).name)
        with interruptible() as interruptions:
            code, details = 0, ""
            try:
                code = super().main(*args, **{**more, "standalone_mode": False}) or 0
            except _Interrupted as interruption:
                details = str(interruption)
            except (typer.Abort, KeyboardInterrupt):  # while the command line was parsed
                interruptions.note()
            except Exception as error:
                if not isinstance(error, INVALID_USAGE):
                    raise
                command = error.ctx.command_path if error.ctx else program
                message = _with_input(error).removesuffix(".")
                _fail(command, f"{message}{'' if message.endswith('?') else '.'} Run: {command} --help")
            if interruptions.signal:
                _print_line(program, "; ".join(filter(None, [interruptions.line, details])))
                code = interruptions.exit_code
        sys.exit(code)

    @override
    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as interruption:  # click would print an empty line
            raise _Interrupted(*interruption.args) from interruption


class _Interrupted(Exception):
    """A command was interrupted. The message, if any, says where its results are."""


class CommandGroup(CommandLine):
    """A `CommandLine` whose commands report their errors in one line, too."""

    @override
    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except Exception as error:
            if not _is_expected(error):
                raise
            _fail(f"{ctx.command_path} {ctx.invoked_subcommand}", _message(error))


def require_our_packages() -> None:
    """Raise `CommandError` if another package `lightrft` hides ours. Call it before importing them."""
    hidden = hiding_package()
    if hidden is not None:
        raise CommandError(hidden)


def _is_expected(error: Exception) -> bool:
    if isinstance(error, BrokenPipeError):  # the reader, such as head, has read enough: typer ends quietly
        return False
    errors = sys.modules.get("lightrft.config.errors")  # without it, no error of ours was raised
    ours = () if errors is None else (errors.LightRFTError,)
    return isinstance(error, (CommandError, OSError, *ours))


def _message(error: Exception) -> str:
    """What is printed of an expected error."""
    if isinstance(error, OSError) and error.errno in (errno.EDQUOT, errno.EIO, errno.ENOSPC):
        where = f"{error.filename}: " if error.filename else ""
        return f"expected to write its output, got: {where}{error.strerror}. Free space, or write elsewhere"
    if isinstance(error, OSError) and error.filename:
        return f"expected a path that this user can open, got {error.filename}: {error.strerror}. Check it and its permissions"
    return str(error)


def _with_input(error: Any) -> str:
    """The message of an invalid command line, with the value that typer's newer versions leave out."""
    message: str = error.format_message()
    cause = error.__cause__ or error.__context__
    inputs = [detail["input"] for detail in cause.errors()] if hasattr(cause, "errors") else []
    return f"{message.removesuffix('.')}, got {inputs[0]!r}" if inputs and "got" not in message else message


def _fail(command: str, message: str) -> NoReturn:
    _print_line(command, message)
    sys.exit(2)


def _print_line(command: str, message: str) -> None:
    lines = [" ".join(line.split()) for line in message.splitlines()]
    typer.echo(f"{command}: {'; '.join(filter(None, lines))}", err=True)
