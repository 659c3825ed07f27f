"""Reading setting names and values from the objects in which scripts keep them."""

import dataclasses
import inspect
from collections.abc import Mapping
from types import BuiltinFunctionType, FunctionType, GeneratorType, MethodType, ModuleType
from typing import Any

from pydantic import BaseModel

from lightrft.config.errors import ConfigError
from lightrft.config.validation import shown

_NAMELESS = (
    type, str, bytes, bytearray, int, float, complex, list, tuple, set, frozenset, FunctionType, MethodType,
    BuiltinFunctionType, ModuleType, GeneratorType,
)  # fmt: skip


def read_settings(source: object) -> dict[str, Any]:
    """Return the names and values that ``source`` holds, one level deep.

    Args:
        source: A mapping, a dataclass instance, a pydantic model, an argparse Namespace, or any other object with
            public data attributes (set on the instance or on its class).

    Returns:
        The values by name.

    Raises:
        ConfigError: ``source`` has no named values (None, a string, a number, a sequence, an array, a class, a
            function, a module), a key of a mapping is not a string, or reading an attribute raised.
    """
    if isinstance(source, Mapping):
        return _with_string_keys(source)
    if source is None or isinstance(source, _NAMELESS) or hasattr(type(source), "__array__"):
        raise ConfigError(
            f"StrategyConfig.from_args: expected an argparse Namespace, a mapping, a dataclass, a pydantic model or an "
            f"object with attributes, got {shown(source)}. Pass for example parser.parse_args()"
        )
    if dataclasses.is_dataclass(source):
        return {field.name: getattr(source, field.name) for field in dataclasses.fields(source)}
    if isinstance(source, BaseModel):
        return {**dict(source), **(source.model_extra or {})}
    return _attributes(source)


def _with_string_keys(source: Mapping[Any, Any]) -> dict[str, Any]:
    for key in source:
        if not isinstance(key, str):
            raise ConfigError(
                f"StrategyConfig.from_args: expected a mapping with string keys, got key {shown(key)}. Use setting names"
            )
    return dict(source)


def _attributes(source: object) -> dict[str, object]:
    """Public data attributes of the object, including its slots, its properties and its classes' attributes."""
    names = [name for cls in reversed(type(source).__mro__[:-1]) for name in vars(cls)] + list(
        getattr(source, "__dict__", ())
    )
    values: dict[str, object] = {}
    for name in dict.fromkeys(names):
        if name.startswith("_") or _is_callable_member(inspect.getattr_static(source, name, None)):
            continue
        try:
            values[name] = getattr(source, name)
        except AttributeError:  # a slot that was never set
            continue
        except Exception as error:
            raise ConfigError(
                f"StrategyConfig.from_args: expected readable attributes, but reading {name!r} of the "
                f"{type(source).__name__} raised {type(error).__name__}: {error}. Pass a dict of the settings instead"
            ) from error
    return values


def _is_callable_member(attribute: object) -> bool:
    return isinstance(attribute, (FunctionType, MethodType, classmethod, staticmethod, type))
