"""Settings in YAML. Apart from the other modules, so that PyYAML is imported only by those who use it."""

import re
from typing import Any

import yaml

from lightrft.config.serialization import invalid, without_duplicates

_SCALARS = [
    ("bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), "tTfF"),
    ("int", re.compile(r"^(?:[-+]?(?:0|[1-9][0-9]*)|0o[0-7]+|0x[0-9a-fA-F]+)$"), "-+0123456789"),
    (
        "float",
        re.compile(
            r"^(?:[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
            r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
        ),
        "-+0123456789.",
    ),
]
"""Scalars of YAML 1.2 that are not strings: type, pattern, first characters."""
_CHANGED = {f"tag:yaml.org,2002:{name}" for name in ("bool", "int", "float", "timestamp")}
"""Types whose scalars YAML 1.1 writes differently."""


class YamlLoader(yaml.SafeLoader):
    """Reads the booleans and numbers of YAML 1.2 and rejects duplicate keys.

    PyYAML reads YAML 1.1, in which ``1e-5`` is a string, ``no`` is False, ``010`` is 8, ``1:30`` is 90 and
    ``2026-01-31`` is a date.
    """

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in _CHANGED]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return the mapping of ``node``. Raises ConfigError if a key occurs twice; PyYAML keeps the last value."""
        without_duplicates([(self.construct_object(key, deep=True), None) for key, _ in node.value])
        return super().construct_mapping(node, deep)


class YamlDumper(yaml.SafeDumper):
    """Quotes a string that YAML 1.1 or 1.2 would read as another type."""


for _cls in (YamlLoader, YamlDumper):
    for _type, _pattern, _first in _SCALARS:
        _cls.add_implicit_resolver(f"tag:yaml.org,2002:{_type}", _pattern, list(_first))


def load_yaml(text: str) -> object:
    """Parse YAML. Raises ConfigError if it is not valid or a key occurs twice in one mapping."""
    try:
        return yaml.load(text, Loader=YamlLoader)
    except yaml.YAMLError as error:
        raise invalid("YAML", error) from error


def dump_yaml(settings: dict[str, object]) -> str:
    """Return ``settings`` as YAML."""
    return yaml.dump(settings, Dumper=YamlDumper, sort_keys=False, allow_unicode=True)
