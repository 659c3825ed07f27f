"""What JSON and YAML files may contain."""

import math

from lightrft.config.errors import ConfigError
from lightrft.config.validation import shown


def invalid(language: str, reason: object) -> ConfigError:
    """Return the error for a text that cannot be parsed."""
    return ConfigError(f"expected valid {language}, got: {reason}. Correct it there")


def without_duplicates(pairs: list[tuple[object, object]]) -> dict[object, object]:
    """Return the pairs of a JSON object or a YAML mapping as a dict. Raises ConfigError if a key occurs twice."""
    mapping: dict[object, object] = {}
    for key, value in pairs:
        if key in mapping:
            raise ConfigError(f"duplicate key {key!r}. Give each setting once")
        mapping[key] = value
    return mapping


def check_serializable(value: object, name: str) -> None:
    """Raise `ConfigError` unless ``value`` survives a round trip through JSON and YAML."""
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ConfigError(f"{name}: expected string keys, got {shown(key)}. Use str(key)")
            check_serializable(item, f"{name}[{key!r}]")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            check_serializable(item, f"{name}[{index}]")
    elif not (value is None or type(value) in (bool, int, str) or (type(value) is float and math.isfinite(value))):
        raise ConfigError(
            f"{name}: expected None, a bool, an int, a finite float, a string, or a list or dict of these, "
            f"got {shown(value)}. Files cannot store this type: convert it"
        )
