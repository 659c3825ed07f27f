"""The options of a script, and what a file may set them to.

A string is read as on the command line. Any other value is stored as it is, once the type and the choices of the option have
accepted it: it may have been written by a run, whose parser had converted it already.
"""

import argparse
import json
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

from lightrft.config.errors import ConfigError
from lightrft.config.validation import shown


def all_parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """Yield ``parser`` and the parsers of its subcommands."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for subparser in dict.fromkeys(action.choices.values()):
                yield from all_parsers(subparser)


def exclusive_groups(
    parser: argparse.ArgumentParser,
) -> Iterator[tuple[argparse._MutuallyExclusiveGroup, dict[str, Any]]]:
    """Yield each group of options of which at most one may be given, and their defaults by name."""
    for each in all_parsers(parser):
        for group in each._mutually_exclusive_groups:
            defaults: dict[str, Any] = {}
            for action in group._group_actions:
                is_text = isinstance(action.default, str) and action.default is not argparse.SUPPRESS
                defaults.setdefault(action.dest, each._get_value(action, action.default) if is_text else action.default)
            yield group, defaults


def own_options(parser: argparse.ArgumentParser) -> dict[str, list[argparse.Action]]:
    """Return the actions that store a value, by name. A default of the parser may have none."""
    own: dict[str, list[argparse.Action]] = {}
    for each in all_parsers(parser):
        own |= {name: [] for name in each._defaults if name not in own}
        for action in each._actions:
            if (
                not isinstance(action, (argparse._HelpAction, argparse._VersionAction))
                and action.dest != argparse.SUPPRESS
            ):
                own.setdefault(action.dest, []).append(action)
    return own


def option_value(parser: argparse.ArgumentParser, actions: list[argparse.Action], name: str, value: object) -> Any:
    """Return what a file's ``value`` means for the option ``name``.

    Args:
        parser: The parser of the script.
        actions: All that store under this name, such as ``--flag`` and ``--no-flag``.
        name: The name.
        value: The value in the file.

    Returns:
        The value to store.

    Raises:
        ConfigError: No action stores such a value.
    """
    stored = [constant for action in actions for constant in _constants(action) if constant is not argparse.SUPPRESS]
    if any(type(constant) is type(value) and constant == value for constant in stored):
        return value
    errors = []
    for action in actions:
        try:
            return _converted(parser, action, value)
        except (argparse.ArgumentError, ConfigError) as error:
            errors.append(error)
    if all(isinstance(action, (argparse._StoreConstAction, argparse.BooleanOptionalAction)) for action in actions):
        expected = " or ".join(dict.fromkeys(map(repr, stored)))
        raise ConfigError(f"extra_args: {name}: expected {expected}, got {shown(value)}")
    raise ConfigError(f"extra_args: {errors[0]}")


def _constants(action: argparse.Action) -> list[object]:
    """Return what an action stores without converting it."""
    if isinstance(action, argparse.BooleanOptionalAction):
        return [True, False, action.default]
    if isinstance(action, argparse._StoreConstAction):
        return [action.const, action.default]
    constants = [action.const, action.default] if action.nargs == "?" else [action.default]
    return [constant for constant in constants if not isinstance(constant, str)]  # argparse converts these


def _converted(parser: argparse.ArgumentParser, action: argparse.Action, value: object) -> Any:
    if isinstance(action, argparse._CountAction):
        return _require(action, value, type(value) is int and value >= 0, "an integer >= 0")
    if isinstance(action, argparse._AppendConstAction):
        return _require(action, value, isinstance(value, list), "a list")
    if isinstance(action, (argparse._StoreConstAction, argparse.BooleanOptionalAction)):
        raise argparse.ArgumentError(action, f"expected another value, got {shown(value)}")
    if isinstance(action, argparse._AppendAction) and not isinstance(action, argparse._ExtendAction):
        return [_values(parser, action, item) for item in _require(action, value, isinstance(value, list), "a list")]
    if type(action).__module__ == "argparse":
        return _values(parser, action, value)
    if not _is_given_as(action, value):
        return value
    scratch = argparse.Namespace(**{action.dest: deepcopy(action.default)})
    action(parser, scratch, _values(parser, action, value), next(iter(action.option_strings), None))
    return getattr(scratch, action.dest)


def _is_given_as(action: argparse.Action, value: object) -> bool:
    """Return whether ``value`` is what an action of the script's own gets, rather than what it stores."""
    return isinstance(value, str if action.nargs in (None, "?") else list) and action.nargs != 0


def _values(parser: argparse.ArgumentParser, action: argparse.Action, value: object) -> Any:
    """Convert what one use of an option gives."""
    if action.nargs in (None, "?", argparse.PARSER):
        return _one(parser, action, value)
    expected = f"a list of {action.nargs}" if isinstance(action.nargs, int) else "a list"
    _require(action, value, isinstance(value, list), expected)
    assert isinstance(value, list)
    _require(action, value, not isinstance(action.nargs, int) or len(value) == action.nargs, expected)
    _require(action, value, action.nargs != "+" or bool(value), "a list of one or more values")
    return [_one(parser, action, item) for item in value]


def _one(parser: argparse.ArgumentParser, action: argparse.Action, value: object) -> Any:
    if isinstance(value, (list, dict)):  # no text of the command line; a function may return one
        return _require(action, value, not isinstance(action.type, (type, type(None))), "one value")
    _require(action, value, value is not None or action.type not in (None, str), "a value")
    converted = parser._get_value(action, value if isinstance(value, str) else json.dumps(value))
    if not isinstance(value, str) and type(converted) is type(value):
        converted = value
    parser._check_value(action, converted)
    return converted


def _require(action: argparse.Action, value: object, holds: bool, expected: str) -> Any:
    if not holds:
        raise argparse.ArgumentError(action, f"expected {expected}, got {shown(value)}")
    return value
