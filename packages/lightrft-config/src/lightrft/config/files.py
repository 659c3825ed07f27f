"""Reading files of settings: YAML, JSON and TOML.

A file maps the names of settings to values. Names that begin with ``engine_`` may also be written as a section, or with a
dot: ``engine: {tp_size: 2}`` and ``engine.tp_size: 2`` mean ``engine_tp_size: 2``. Values that are not settings are under
``extra_args``; those that rollout engines read may also be among the settings.
"""

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightrft.config.errors import ConfigError, ConfigFileError
from lightrft.config.names import near_miss
from lightrft.config.serialization import check_serializable, invalid, without_duplicates
from lightrft.config.settings import Settings
from lightrft.config.validation import combined_error, path_fault, shown

OF_ENGINES = re.compile(r"(engine_|limit_mm_).*|pretrain$|trust_remote_code$|weight_sync_verify$")
"""Extra arguments that engines read, and check themselves."""
SECTIONS = ("engine", "extra_args")
"""Names whose parts may be separated by dots."""


def read_file(call: str, path: str | Path, load: Callable[[str], object] | None = None) -> dict[str, Any]:
    """Return the settings in a file by name, not validated yet.

    Args:
        call: The caller, for error messages.
        path: The file.
        load: Parses its text. By default that of its suffix: .yaml, .yml, .json or .toml.

    Returns:
        The settings, with everything else in ``extra_args``.

    Raises:
        ConfigError: The file is not valid, sets a name twice, or has no names.
        ConfigFileError: The file cannot be read.
    """
    file = as_path(call, path)
    if load is None:
        load = _LOADERS.get(file.suffix.lower())
    if load is None:
        raise ConfigError(f"{call}: expected a file named {', '.join(_LOADERS)}, got {path}. Rename it")
    with file_errors(call, "read", file):
        data = file.read_bytes()
    with naming(path):
        try:
            return _by_setting(load(data.decode("utf-8-sig")))
        except UnicodeDecodeError as error:
            got = f"byte 0x{data[error.start]:02x} at position {error.start}"
            raise ConfigError(f"expected text in UTF-8, got {got}. Save it as UTF-8") from error
        except RecursionError as error:
            raise ConfigError("expected settings, got values nested too deeply. Remove levels") from error


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Name the file in what the body raises: a `ConfigError`, or an error of a parser."""
    try:
        yield
    except ValueError as error:  # ConfigError, invalid JSON or UTF-8, an integer with too many digits
        named = ConfigError(f"{path}: {error}")
        named.messages = error.messages if isinstance(error, ConfigError) else ()
        raise named from error


def as_path(call: str, path: str | Path) -> Path:
    """Return ``path`` with the home directory for ``~``."""
    if not isinstance(path, (str, os.PathLike)):
        raise ConfigError(f"{call}: expected the path of a file, got {shown(path)}")
    if fault := path_fault(os.fspath(path)):
        raise ConfigError(f"{call}: expected the path of a file, got {shown(path)}, {fault}")
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ConfigFileError(f"{call}: cannot find {path}: {error}. Check the path") from error


@contextmanager
def file_errors(call: str, verb: str, path: Path) -> Iterator[None]:
    """Convert an `OSError` of the body to a `ConfigFileError` that names ``path``."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigFileError(f"{call}: cannot {verb} {path}: {reason}. Check the path") from error


def insert(values: dict[str, Any], name: str, value: object) -> None:
    """Set ``name``, with dots for the levels of nested mappings, in ``values``. Raises `ConfigError` if it is set already."""
    if not isinstance(name, str):
        raise ConfigError(f"expected string keys, got {shown(name)}. Put it in quotes")
    *sections, last = name.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ConfigError(f"{name!r} and {section!r} are both given. Remove one of the two")
    if isinstance(value, Mapping) and isinstance(values.get(last), dict):
        for key, item in value.items():
            insert(values[last], key, item)
    elif last in values:
        raise ConfigError(f"duplicate key {name!r}. Give each setting once")
    else:
        values[last] = value


def _by_setting(content: object) -> dict[str, Any]:
    """Resolve dots and the section ``engine``, and move extra arguments of engines to ``extra_args``."""
    if content is None:
        content = {}
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise ConfigError(f"expected a mapping of setting names to values, got {shown(content)}")
    settings: dict[str, Any] = {}
    for name, value in content.items():
        dotted = name.partition(".")[0] in (*SECTIONS, "engine_arguments")
        insert(settings, name, value) if dotted else settings.update({name: value})
    extra = _mapping("extra_args", settings.get("extra_args"))
    for name, value in _mapping("engine", settings.pop("engine", None)).items():
        insert(settings, f"engine_{name}", value)
    of_engines = [name for name in settings if name not in Settings.model_fields and OF_ENGINES.match(name)]
    check_names(of_engines)
    for name in of_engines:
        insert(extra, name, settings.pop(name))
    check_serializable(extra, "extra_args")
    return {**settings, "extra_args": extra} if extra else settings


def _mapping(name: str, value: object) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ConfigError(f"{name}: expected a mapping of names to values, got {shown(value)}")
    return value


def check_names(names: list[str]) -> None:
    """Raise `ConfigError` for names that are probably misspelled settings."""
    likely = {name: meant for name in names if (meant := near_miss(name, Settings.model_fields)) is not None}
    if likely:
        raise combined_error(f"{name!r} is not a setting. Did you mean {meant!r}?" for name, meant in likely.items())


def _load_yaml(text: str) -> object:
    from lightrft.config.yaml_format import load_yaml

    return load_yaml(text)


def _load_toml(text: str) -> object:
    import tomllib

    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        twice = "duplicate key, give each setting once: " if "overwrite" in str(error) else ""
        raise invalid("TOML", f"{twice}{error}") from error


def load_json(text: str | bytes | bytearray) -> object:
    """Parse JSON. Raises ConfigError if it is not valid or a key occurs twice in one object."""
    try:
        return json.loads(text, object_pairs_hook=without_duplicates)
    except json.JSONDecodeError as error:
        raise invalid("JSON", error) from error


_LOADERS: dict[str, Callable[[str], object]] = {
    ".yaml": _load_yaml,
    ".yml": _load_yaml,
    ".json": load_json,
    ".toml": _load_toml,
}
