"""Settings as command-line options, and files of settings below them.

argparse alone, because scripts bring parsers of their own. jsonargparse and pydantic-settings need theirs, keep the last of
two equal keys, read YAML 1.1, and convert values that `StrategyConfig` refuses to convert.
"""

import argparse
import json
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from lightrft.config.errors import ConfigError
from lightrft.config.files import OF_ENGINES, check_names, naming, read_file
from lightrft.config.names import nearest
from lightrft.config.option_values import all_parsers, exclusive_groups, option_value, own_options
from lightrft.config.settings import Settings
from lightrft.config.validation import combined_error, invalid_settings, shown

CONFIG = "--config"
ENGINE = "--engine."


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add an option ``--name`` for each setting, with its default and help. See `StrategyConfig.add_arguments`."""
    group = parser.add_argument_group("LightRFT strategy")
    if CONFIG not in parser._option_string_actions:
        group.add_argument(
            CONFIG, action=_ConfigFile, dest=argparse.SUPPRESS, metavar="FILE",
            help="YAML, JSON or TOML file of settings, which other options override; may be repeated",
        )  # fmt: skip
        parser.parse_known_args = partial(_parse, parser, parser.parse_known_args)  # type: ignore[method-assign, assignment]
    for name, field in Settings.model_fields.items():
        options = list(dict.fromkeys([f"--{name}", f"--{name.replace('_', '-')}"]))
        options += [
            ENGINE + option[len(ENGINE) :] for option in options if option.startswith(("--engine_", "--engine-"))
        ]
        if name == "extra_args" or any(option in parser._option_string_actions for option in options):
            continue
        summary = (field.description or "").replace("\n", " ").replace("%", "%%")
        group.add_argument(*options, dest=name, default=field.default, help=summary, **_option_for(field))
    return parser


class _ConfigFile(argparse.Action):
    """In the help, and reached only by a parser that does not read files."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        parser.error(
            f"{CONFIG}: expected the full name of this option, and a parser that was passed to add_arguments itself. Write {CONFIG} in full, and pass this parser, not one of its parents, to add_arguments"
        )


Parsed = tuple[argparse.Namespace, list[str]]


class _FromFile:
    """The default of an option that a file sets, while the command line is parsed. The help shows the value."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __str__(self) -> str:
        return str(self.value)

    def __int__(self) -> int:
        return int(self.value)

    def __float__(self) -> float:
        return float(self.value)

    def __copy__(self) -> list[object]:  # "append" and "extend" begin with a copy of the default
        return []

    def __add__(self, more: int) -> int:  # "count"
        return more

    def __iter__(self) -> Iterator[object]:  # "extend" without words
        yield self


def _parse(
    parser: argparse.ArgumentParser,
    parse_known_args: Callable[..., Parsed],
    args: Sequence[str] | None = None,
    namespace: Any = None,
) -> Parsed:
    """Parse the command line, and set what it leaves out to what the files say."""
    files, of_engines, others = _split(parser, list(sys.argv[1:] if args is None else args))
    namespace = argparse.Namespace() if namespace is None else namespace
    values: dict[str, Any] = {}
    try:
        for file in files:
            settings = read_file(CONFIG, file)
            with naming(file):
                upper = _checked(parser, settings)
            excluded = _excluded(parser, upper)
            values = _merged({name: value for name, value in values.items() if name not in excluded}, upper)
        for name, path, value in of_engines:
            lower = values[name] if name in values else getattr(namespace, name, parser.get_default(name))
            values[name] = _override(name, lower, path, value)
    except ConfigError as error:
        parser.exit(2, f"{parser.prog}: error: {' '.join(str(error).split())}\n")
    if not values:
        return parse_known_args(others, namespace)
    with _below_the_command_line(parser, namespace, values):
        namespace, unknown = parse_known_args(others, namespace)
    rest = {name for name, actions in own_options(parser).items() for a in actions if a.nargs == argparse.REMAINDER}
    line = {
        name: value for name, value in vars(namespace).items() if not _is_left_out(value, name in values.keys() & rest)
    }
    excluded = _excluded(parser, line, values.keys() & line.keys())
    for name in values.keys() - line.keys():
        setattr(namespace, name, excluded.get(name, values[name]))
        if getattr(namespace, name) is argparse.SUPPRESS:
            delattr(namespace, name)
    return namespace, unknown


@contextmanager
def _below_the_command_line(parser: argparse.ArgumentParser, namespace: Any, values: dict[str, Any]) -> Iterator[None]:
    """Make ``values`` the defaults, and require none of them."""
    own = own_options(parser)
    for name, value in values.items():  # an action of the script's own may read what it replaces
        is_known = all(type(action).__module__ in ("argparse", __name__) for action in own.get(name, ()))
        setattr(namespace, name, _FromFile(value) if is_known else value)
    with ExitStack() as restored:
        for group, defaults in exclusive_groups(parser):
            restored.callback(setattr, group, "required", group.required)
            group.required = group.required and all(values.get(name, at) == at for name, at in defaults.items())
        for each in all_parsers(parser):
            restored.callback(setattr, each, "_defaults", each._defaults)
            each._defaults = {name: value for name, value in each._defaults.items() if name not in values}
            for action in each._actions:
                if action.dest in values:
                    restored.callback(vars(action).update, default=action.default, required=action.required)
                    action.required = action.required and values[action.dest] is None
                    action.default = getattr(namespace, action.dest)
        yield


def _is_left_out(value: object, is_rest: bool) -> bool:
    """Return whether the command line did not give ``value``. It never gives an empty rest."""
    is_empty = isinstance(value, list) and not value and is_rest
    return is_empty or any(isinstance(item, _FromFile) for item in (value if isinstance(value, list) else [value]))


def _excluded(parser: argparse.ArgumentParser, values: dict[str, Any], given: Set[str] = frozenset()) -> dict[str, Any]:
    """Return the defaults of the options that others exclude: those ``given``, and those that differ from their defaults."""
    excluded: dict[str, Any] = {}
    for _, defaults in exclusive_groups(parser):
        chosen = [name for name, default in defaults.items() if name in given or values.get(name, default) != default]
        excluded |= {name: default for name, default in defaults.items() if chosen and name not in chosen}
    return excluded


def _split(
    parser: argparse.ArgumentParser, args: list[str]
) -> tuple[list[str], list[tuple[str, list[str], object]], list[str]]:
    """Return the files, the extra arguments of engines that no option stands for, and the other words of ``args``."""
    files: list[str] = []
    of_engines: list[tuple[str, list[str], object]] = []
    others: list[str] = []
    words = iter(args)
    for word in words:
        option, equals, value = word.partition("=")
        if word == "--":
            others += [word, *words]
        elif option != CONFIG and (not option.startswith(ENGINE) or option in parser._option_string_actions):
            others.append(word)
        elif not equals and (value := next(words, "--")).startswith("--"):
            parser.error(f"argument {option}: expected one argument")
        elif option == CONFIG:
            files.append(value)
        else:
            name, *path = option.removeprefix(ENGINE).split(".")
            of_engines.append((f"engine_{name.replace('-', '_')}", path, _json_or_text(value)))
    return files, of_engines, others


def _json_or_text(text: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _override(name: str, lower: object, path: list[str], value: object) -> object:
    """Return a copy of ``lower``, an extra argument of engines, in which ``value`` is at ``path``."""
    if name in Settings.model_fields:
        raise ConfigError(f"{name} is a setting, not a mapping. Write --{name} VALUE")
    check_names([name])
    return _replaced(name, lower, path, value)


def _replaced(name: str, lower: object, path: list[str], value: object) -> object:
    if not path:
        return value
    if lower is not None and not isinstance(lower, Mapping):
        raise ConfigError(
            f"{name}: expected a mapping, to set {path[0]!r} in it, got {shown(lower)}. Remove one of the two"
        )
    first, *rest = path
    lower = lower or {}
    return {**lower, first: _replaced(f"{name}.{first}", lower.get(first), rest, value)}


def _merged(lower: Any, upper: Any) -> Any:
    """Return ``upper``, with what ``lower`` alone has if both are mappings."""
    if not (isinstance(lower, Mapping) and isinstance(upper, Mapping)):
        return upper
    return {**lower, **{name: _merged(lower.get(name), value) for name, value in upper.items()}}


def _checked(parser: argparse.ArgumentParser, settings: dict[str, Any]) -> dict[str, Any]:
    """Return what a file sets, of settings and of the script's options, as the parser stores it.

    Settings are validated one by one. Conflicts are left to `StrategyConfig`, which sees the command line too.
    """
    extra = settings.pop("extra_args", None) or {}
    try:
        valid = Settings(**settings)
    except ValidationError as error:
        raise combined_error(invalid_settings(error, settings).values()) from None
    values = {name: getattr(valid, name) for name in settings}
    own = own_options(parser)
    for name, value in extra.items():
        if name in Settings.model_fields:
            raise ConfigError(f"extra_args: {name!r} is a setting. Write it outside extra_args")
        if name in own:
            values[name] = option_value(parser, own[name], name, value) if own[name] else value
        elif OF_ENGINES.match(name):
            values[name] = value
        else:
            likely = nearest(name, own)
            hint = f"Did you mean {likely!r}?" if likely else "Remove it"
            raise ConfigError(f"extra_args: {name!r} is not an option of this script. {hint}")
    _check_exclusive(parser, values)
    return values


def _check_exclusive(parser: argparse.ArgumentParser, values: dict[str, Any]) -> None:
    for _, defaults in exclusive_groups(parser):
        chosen = [name for name, default in defaults.items() if values.get(name, default) != default]
        if len(chosen) > 1:
            raise ConfigError(f"extra_args: {' and '.join(map(repr, chosen))} exclude each other. Remove all but one")


def _option_for(field: FieldInfo) -> dict[str, Any]:
    """Return the keyword arguments of ``add_argument`` that parse a setting."""
    members = _union_members(field.annotation)
    optional = type(None) in members
    value_types = [member for member in members if member is not type(None)]
    if value_types == [bool]:
        return {"action": argparse.BooleanOptionalAction}
    if get_origin(value_types[0]) is Literal:
        choices = list(get_args(value_types[0]))
        return {"type": _parser_of([str], optional=optional), "choices": [*choices, None] if optional else choices}
    if get_origin(value_types[0]) is tuple and Ellipsis in get_args(value_types[0]):
        return {"type": str, "nargs": "*"}
    if get_origin(value_types[0]) is tuple:
        return {"type": _parser_of([float], optional=False), "nargs": len(get_args(value_types[0]))}
    if any(get_origin(value_type) is tuple for value_type in value_types):
        return {"type": _parser_of([str], optional=optional), "nargs": "+", "action": _OneOrMore}
    if bool in value_types:  # without a value it is a flag
        return {"type": _parser_of(value_types, optional=optional), "nargs": "?", "const": True}
    return {"type": _parser_of(value_types, optional=optional)}


def _union_members(annotation: object) -> list[object]:
    """Return the members of a union, or the one type, without constraints."""
    if get_origin(annotation) is Annotated:
        return _union_members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [option for member in get_args(annotation) for option in _union_members(member)]
    return [annotation]


def _parser_of(value_types: list[object], *, optional: bool) -> Callable[[str], object]:
    words = {"true": True, "false": False} if bool in value_types else {}
    convert = int if int in value_types else _number if float in value_types else str

    def parse(text: str) -> object:
        if optional and text.lower() in ("none", "null"):
            return None
        return words.get(text.lower()) if text.lower() in words else convert(text)

    parse.__name__ = convert.__name__.strip("_")  # argparse puts it in its error message
    return parse


def _number(text: str) -> float:
    """Parse a float. An integer that a float cannot hold exactly stays an int, which `StrategyConfig` rejects by name."""
    number = float(text)
    with suppress(ValueError):  # not the literal of an integer
        return number if number == int(text) else int(text)
    return number


class _OneOrMore(argparse.Action):
    """Stores one value as it is, and several values as a tuple."""

    def __call__(self, parser: object, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        setattr(namespace, self.dest, values[0] if len(values) == 1 else tuple(values))
