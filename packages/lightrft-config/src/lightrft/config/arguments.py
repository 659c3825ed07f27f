"""Settings as command-line options."""

import argparse
import types
from collections.abc import Callable
from contextlib import suppress
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from lightrft.config.settings import Settings


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add an option ``--name`` for each setting, with its default and help. See `StrategyConfig.add_arguments`."""
    group = parser.add_argument_group("LightRFT strategy")
    for name, field in Settings.model_fields.items():
        options = list(dict.fromkeys([f"--{name}", f"--{name.replace('_', '-')}"]))
        if name == "extra_args" or any(option in parser._option_string_actions for option in options):
            continue
        summary = (field.description or "").replace("\n", " ").replace("%", "%%")
        group.add_argument(*options, dest=name, default=field.default, help=summary, **_option_for(field))
    return parser


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
