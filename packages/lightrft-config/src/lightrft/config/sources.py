"""Reading settings out of whatever a script holds them in."""

import dataclasses
import inspect
from collections.abc import Mapping
from types import BuiltinFunctionType, FunctionType, GeneratorType, MethodType, ModuleType
from typing import Any

from pydantic import BaseModel

from lightrft.config.errors import ConfigError

_NAMELESS = (
    type, str, bytes, bytearray, int, float, complex, list, tuple, set, frozenset, FunctionType, MethodType,
    BuiltinFunctionType, ModuleType, GeneratorType,
)  # fmt: skip


def read(source: object) -> dict[str, Any]:
    """The names and values that ``source`` holds, one level deep.

    Takes a mapping, a dataclass instance, a pydantic model, an argparse Namespace, or any other object
    with public data attributes, its own or its class's. Raises `ConfigError` for anything that has no
    names to read: None, a string, a number, a sequence, an array, a class, a function, a module.
    """
    if isinstance(source, Mapping):
        return _with_string_keys(source)
    if source is None or isinstance(source, _NAMELESS) or hasattr(type(source), "__array__"):
        raise ConfigError(
            f"from_args: got {source!r} ({type(source).__name__}); wanted an argparse Namespace, a mapping, "
            f"a dataclass, a pydantic model, or an object with attributes"
        )
    if dataclasses.is_dataclass(source):
        return {field.name: getattr(source, field.name) for field in dataclasses.fields(source)}
    if isinstance(source, BaseModel):
        return {**dict(source), **(source.model_extra or {})}
    return _attributes(source)


def _with_string_keys(source: Mapping[Any, Any]) -> dict[str, Any]:
    strange = [key for key in source if not isinstance(key, str)]
    if strange:
        raise ConfigError(f"from_args: names of settings are strings; got {strange[0]!r} ({type(strange[0]).__name__})")
    return dict(source)


def _attributes(source: object) -> dict[str, Any]:
    """Public data attributes: of the object, of its slots and properties, and of its classes."""
    names = [name for cls in reversed(type(source).__mro__[:-1]) for name in vars(cls)] + list(
        getattr(source, "__dict__", ())
    )
    found: dict[str, Any] = {}
    for name in dict.fromkeys(names):
        if name.startswith("_") or _is_behaviour(inspect.getattr_static(source, name, None)):
            continue
        try:
            found[name] = getattr(source, name)
        except AttributeError:  # a slot that was never set
            continue
        except Exception as error:
            raise ConfigError(
                f"from_args: reading {name!r} of the {type(source).__name__} raised {type(error).__name__}: {error}"
            ) from error
    return found


def _is_behaviour(attribute: object) -> bool:
    return isinstance(attribute, (FunctionType, MethodType, classmethod, staticmethod, type))
