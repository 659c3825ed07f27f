"""Error messages: what a setting expects, what it got, and the remedy."""

import os
from collections.abc import Iterable
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from lightrft.config.errors import ConfigError
from lightrft.config.names import nearest
from lightrft.config.settings import Settings

_TYPE_WORDS = {
    "integer": "an integer",
    "number": "a number",
    "boolean": "True or False",
    "string": "a string",
    "null": "None",
    "object": "a dict with string keys",
}
_BOUNDS = {"minimum": ">= ", "exclusiveMinimum": "> ", "maximum": "<= ", "exclusiveMaximum": "< "}
_LONGEST_REPR = 200
"""Characters of a value that a message shows."""
_LONGEST_NAME = 255
"""Bytes of a name in a directory, on every usual file system."""


def shown(value: object) -> str:
    """Return the type and the shortened repr of ``value``, in one line: ``int (3)``."""
    if value is None:
        return "None"
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # more digits than Python converts
        text = "too many digits to show"
    return f"{type(value).__name__} ({text if len(text) <= _LONGEST_REPR else text[:_LONGEST_REPR] + '...'})"


def path_fault(path: str | bytes) -> str:
    """Return what makes ``path`` unusable on every file system, and a remedy: ``with a byte 0. Remove it``. Empty: nothing."""
    if isinstance(path, bytes):
        return "from an object whose __fspath__ gives bytes. Pass os.fsdecode(path)"
    if "\0" in path:
        return "with a byte 0. Remove it"
    try:
        names = os.fsencode(path).split(b"/")
    except UnicodeEncodeError:
        return "with a character that no file name can have. Remove it"
    return f"with a name of more than {_LONGEST_NAME} bytes. Shorten it" if max(map(len, names)) > _LONGEST_NAME else ""


def describe(schema: dict[str, Any]) -> str:
    """Describe the values that a JSON schema allows: ``an integer >= 0 and <= 3``."""
    if "anyOf" in schema:
        return " or ".join(describe(option) for option in schema["anyOf"])
    if "enum" in schema:
        return "one of " + ", ".join(map(repr, schema["enum"]))
    if "prefixItems" in schema:
        return f"{len(schema['prefixItems'])} values, each {describe(schema['prefixItems'][0])}"
    if schema.get("type") == "array":
        return f"a list (each value {describe(schema['items'])})"
    bounds = " and ".join(sign + str(schema[key]) for key, sign in _BOUNDS.items() if key in schema)
    words = _TYPE_WORDS.get(schema.get("type", ""), "any value")
    if schema.get("minLength"):
        words = "a non-empty string"
    return f"{words} {bounds}".strip()


def invalid_settings(error: ValidationError, given: dict[str, object]) -> dict[str, str]:
    """Return a message for each invalid setting, by name: what it expects and what it got."""
    messages: dict[str, str] = {}
    for detail in error.errors():
        messages.setdefault(str(detail["loc"][0]), _message(detail, given))
    return messages


def combined_error(messages: Iterable[str]) -> ConfigError:
    """Return one `ConfigError` for all ``messages``, one a line."""
    every = tuple(messages)
    error = ConfigError("StrategyConfig: " + "\n  ".join(every))
    error.messages = every
    return error


def _message(error: ErrorDetails, given: dict[str, object]) -> str:
    name = str(error["loc"][0])
    if error["type"] == "extra_forbidden":
        likely = nearest(name, Settings.model_fields)
        remedy = f"Did you mean {likely!r}?" if likely else "Values that are not settings belong in extra_args."
        return f"{name!r} is not a setting, got {shown(given.get(name))}. {remedy}"
    expected = describe(Settings.model_json_schema()["properties"][name])
    remedy = f". {error['ctx']['error']}" if error["type"] == "value_error" else ""
    return f"{name}: expected {expected}, got {shown(given.get(name))}{remedy}"
