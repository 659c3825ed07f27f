"""Settings on the command line and in YAML."""

import argparse
import math
import re
import types
from collections.abc import Callable
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic.fields import FieldInfo

from lightrft.config.errors import ConfigError
from lightrft.config.settings import Settings


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add ``--name`` for each setting, with its default and help; those the parser has already stay its own.

    Hyphens may stand for underscores. A flag (``--bf16``) has its opposite (``--no-bf16``); ``None`` can be given where a setting allows it.
    """
    group = parser.add_argument_group("LightRFT strategy")
    for name, field in Settings.model_fields.items():
        options = list(dict.fromkeys([f"--{name}", f"--{name.replace('_', '-')}"]))
        if name == "extra_args" or any(option in parser._option_string_actions for option in options):
            continue
        summary = (field.description or "").replace("\n", " ").replace("%", "%%")
        group.add_argument(*options, dest=name, default=field.default, help=summary, **_reading(field))
    return parser


def _reading(field: FieldInfo) -> dict[str, Any]:
    """How argparse reads a setting."""
    options = _options(field.annotation)
    kinds = [option for option in options if option is not type(None)]
    if kinds == [bool]:
        return {"action": argparse.BooleanOptionalAction}
    if get_origin(kinds[0]) is Literal:
        parse, choices = _parser_of([str], optional=type(None) in options), list(get_args(kinds[0]))
        return {"type": parse, "choices": [*choices, None] if type(None) in options else choices}
    if get_origin(kinds[0]) is tuple:
        return {"type": float, "nargs": len(get_args(kinds[0]))}
    if any(get_origin(kind) is tuple for kind in kinds):
        return {"type": _parser_of([str], optional=type(None) in options), "nargs": "+", "action": _OneOrMore}
    return {"type": _parser_of(kinds, optional=type(None) in options)}


def _options(annotation: Any) -> list[Any]:
    """The alternatives of a union, or the one type there is, without their constraints."""
    if get_origin(annotation) is Annotated:
        return _options(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [option for member in get_args(annotation) for option in _options(member)]
    return [annotation]


def _parser_of(kinds: list[Any], *, optional: bool) -> Callable[[str], Any]:
    words = {"true": True, "false": False} if bool in kinds else {}
    kind = next((kind for kind in kinds if kind in (int, float)), str)

    def parse(text: str) -> Any:
        if optional and text.lower() in ("none", "null"):
            return None
        return words.get(text.lower(), text) if words else kind(text)

    parse.__name__ = kind.__name__  # argparse puts it in its error message
    return parse


class _OneOrMore(argparse.Action):
    """Stores one value as it is, and several as a tuple."""

    def __call__(self, parser: object, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        setattr(namespace, self.dest, values[0] if len(values) == 1 else tuple(values))


# Files


class YamlLoader(yaml.SafeLoader):
    """YAML whose ``1e-5`` is a number, as in YAML 1.2; in YAML 1.1, PyYAML's, it is a string. No name stands twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping. Raises where one of its keys stands twice: YAML forbids it, and PyYAML takes the last."""
        unique([(self.construct_object(key, deep=True), None) for key, _ in node.value])
        return super().construct_mapping(node, deep)


class YamlDumper(yaml.SafeDumper):
    """Writes what `YamlLoader` reads: a string that looks like a number there is quoted."""


for _kind in (YamlLoader, YamlDumper):
    _kind.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
        list("-+0123456789."),
    )


def unique(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    """The pairs of a JSON object or a YAML mapping, in a dict. Raises `ConfigError` where a name stands twice."""
    found: dict[Any, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ConfigError(f"{name!r} stands there twice; give each setting once")
        found[name] = value
    return found


def check_plain(value: object, where: str) -> None:
    """Raise `ConfigError` unless ``value`` comes back equal from JSON and from YAML."""
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ConfigError(f"{where} has the key {key!r} ({type(key).__name__}); JSON has strings only")
            check_plain(item, f"{where}[{key!r}]")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            check_plain(item, f"{where}[{index}]")
    elif not (value is None or type(value) in (bool, int, str) or (type(value) is float and math.isfinite(value))):
        raise ConfigError(
            f"{where} is {value!r} ({type(value).__name__}), which does not come back from a file as it is; make it a "
            f"string, a finite number, a bool, None, or a list or dict of these"
        )
