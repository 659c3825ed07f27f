"""Turning pydantic's findings into one `ConfigError` that a person can act on."""

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


def describe(schema: dict[str, Any]) -> str:
    """What a JSON-schema type allows, in words: ``an integer >= 0 and <= 3``."""
    if "anyOf" in schema:
        return " or ".join(describe(option) for option in schema["anyOf"])
    if "enum" in schema:
        return "one of " + ", ".join(map(repr, schema["enum"]))
    if "prefixItems" in schema:
        return f"{len(schema['prefixItems'])} values, each {describe(schema['prefixItems'][0])}"
    if schema.get("type") == "array":
        return f"a list, each {describe(schema['items'])}"
    bounds = " and ".join(sign + str(schema[key]) for key, sign in _BOUNDS.items() if key in schema)
    words = _TYPE_WORDS.get(schema.get("type", ""), "any value")
    if schema.get("minLength"):
        words = "a string that is not empty"
    return f"{words} {bounds}".strip()


def allowed(name: str) -> str:
    """What the setting ``name`` allows, in words."""
    return describe(Settings.model_json_schema()["properties"][name])


def _sentence(error: ErrorDetails, given: dict[str, Any]) -> str:
    name = str(error["loc"][0])
    if error["type"] == "extra_forbidden":
        likely = nearest(name, Settings.model_fields)
        hint = f"did you mean {likely!r}?" if likely else "from_args keeps names of your own in extra_args"
        return f"{name!r} is not a setting (got {given.get(name)!r}); {hint}"
    value = given.get(name)
    return f"{name}: got {value!r} ({type(value).__name__}); allowed is {allowed(name)}"


def config_error(error: ValidationError, given: dict[str, Any]) -> ConfigError:
    """Name each setting that is wrong, what it got and what it allows."""
    return refusal(dict.fromkeys(_sentence(detail, given) for detail in error.errors()))


def refusal(reasons: Iterable[str]) -> ConfigError:
    """One error for all that is wrong, a line each."""
    return ConfigError("StrategyConfig: " + "\n  ".join(reasons))
