"""`StrategyConfig`: the settings, and the ways to read, check and write them."""

import json
import os
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

from pydantic import ConfigDict, PrivateAttr, ValidationError

from lightrft.config.conflicts import conflicts, conflicts_of_others
from lightrft.config.errors import ConfigError
from lightrft.config.files import as_path, file_errors, load_json, naming, read_file
from lightrft.config.names import near_miss, nearest
from lightrft.config.serialization import check_serializable
from lightrft.config.settings import Owner, Settings
from lightrft.config.sources import read_settings
from lightrft.config.validation import combined_error, invalid_settings, shown

if TYPE_CHECKING:
    import argparse


class StrategyConfig(Settings):
    """All settings of a run, validated and immutable.

    The constructor accepts only known names and values of the right type. `from_args` reads the arguments of a script
    and keeps names that are not settings in ``extra_args``.

    A value is stored exactly or rejected. Nothing is converted, with these exceptions: a float setting accepts an
    integer that a float holds exactly, and a setting with several values accepts a list.

    Args:
        settings: Settings by name. See ``docs/settings.md``.

    Raises:
        ConfigError: A setting is unknown, has the wrong type, is out of range, or conflicts with another one. The
            message lists everything that is wrong.
    """

    # `Settings` has all docstrings, and reading them takes a while. The signature comes with the validator.
    model_config = ConfigDict(use_attribute_docstrings=False, defer_build=False)
    _source: Any = PrivateAttr(default=None)

    if not TYPE_CHECKING:  # type checkers derive the signature from the fields, as for a dataclass

        def __init__(self, /, **settings):
            try:
                super().__init__(**settings)
            except ValidationError as error:
                invalid = invalid_settings(error, settings)
                raise combined_error([*invalid.values(), *conflicts_of_others(settings, invalid)]) from None
            messages = list(conflicts(self))
            if messages:
                raise combined_error(messages)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StrategyConfig) and dict(self) == dict(other)

    __hash__ = None  # type: ignore[assignment]  # extra_args is a dict

    def __setattr__(self, name: str, value: object) -> None:
        if name in type(self).model_fields:
            raise ConfigError(
                f"StrategyConfig.{name}: cannot assign {value!r}, a config is immutable. "
                f"Make a copy: config.replace({name}={value!r})"
            )
        super().__setattr__(name, value)

    # Reading

    @classmethod
    def model_validate_json(cls, json_data: str | bytes | bytearray, **_: object) -> Self:
        """Return a config with the settings in a JSON text, as `from_json` does for a file.

        Args:
            json_data: The text.

        Returns:
            The config.

        Raises:
            ConfigError: The text is not valid JSON, or a setting is unknown or invalid.
        """
        call = "StrategyConfig.model_validate_json"
        if not isinstance(json_data, (str, bytes, bytearray)):
            raise ConfigError(f"{call}: expected a JSON text, got {shown(json_data)}")
        try:
            return cls.model_validate(load_json(json_data))
        except ValueError as error:  # ConfigError too
            raise ConfigError(f"{call}: {error}") from None

    @classmethod
    def model_validate_strings(cls, obj: object, **_: object) -> Self:
        """Refuse: settings are not converted from strings.

        Raises:
            ConfigError: Always. Parse a command line with `add_arguments`.
        """
        raise ConfigError(
            f"StrategyConfig.model_validate_strings: expected values of the right types, got {shown(obj)}. Parse strings "
            f"with add_arguments(parser), or use model_validate"
        )

    @classmethod
    def model_validate(cls, obj: object, **_: object) -> Self:
        """Return a config with the settings in ``obj``, as the constructor does.

        Args:
            obj: Settings by name, or a config, which is returned unchanged.

        Returns:
            The config.

        Raises:
            ConfigError: ``obj`` is neither, or a setting is invalid.
        """
        if isinstance(obj, Mapping):
            return cls(**_with_names(obj, "StrategyConfig.model_validate"))
        if isinstance(obj, cls):
            return obj
        raise ConfigError(
            f"StrategyConfig.model_validate: expected a mapping of settings, got {shown(obj)}. "
            f"For other objects use StrategyConfig.from_args"
        )

    @classmethod
    def from_args(cls, source: object) -> Self:
        """Read settings from the arguments of a script.

        Names that are not settings are kept in ``extra_args``. A name that resembles a setting raises in a mapping, and
        warns in other objects, which also hold what the script uses itself.

        Args:
            source: An argparse Namespace, a mapping, a dataclass, a pydantic model, or any object with attributes. A
                `StrategyConfig` is returned unchanged.

        Returns:
            The config. Its `args` is ``source``.

        Raises:
            ConfigError: ``source`` has no named values, a setting is invalid, or a name in a mapping is misspelled.
        """
        if isinstance(source, cls):
            return source
        values = read_settings(source)
        nested = values.pop("extra_args", None)
        nested = {} if nested is None else nested
        if not isinstance(nested, Mapping):
            raise ConfigError(
                f"StrategyConfig.from_args: extra_args: expected a dict, got {shown(nested)}. Pass {{name: value}}"
            )
        known = {name: value for name, value in values.items() if name in cls.model_fields}
        extra = {name: value for name, value in values.items() if name not in cls.model_fields}
        for name in extra.keys() & nested.keys():
            raise ConfigError(
                f"StrategyConfig.from_args: {name!r} is given twice, by itself and in extra_args. Remove one of the two"
            )
        _check_extra(extra, raises=isinstance(source, Mapping))
        config = cls(**known, extra_args={**extra, **nested})
        config._source = source
        return config

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """Read a file of settings: YAML, JSON or TOML, by its suffix.

        Booleans and numbers in YAML follow YAML 1.2: ``1e-5`` is a number; ``no``, ``010`` and ``1:30`` are strings. The
        section ``engine`` has the settings and extra arguments of rollout engines, without ``engine_`` in their names.

        Args:
            path: The file: ``.yaml``, ``.yml``, ``.json`` or ``.toml``. An empty YAML or TOML file means the defaults.

        Returns:
            The config.

        Raises:
            ConfigError: The file has another suffix or is not valid, a name occurs twice, or a setting is unknown or
                invalid.
            ConfigFileError: The file cannot be read.
        """
        return cls._from_file("from_file", path)

    @classmethod
    def from_yaml(cls, path: str | Path) -> Self:
        """Read a YAML file of any name, as `from_file` does.

        Args:
            path: The file.

        Returns:
            The config.

        Raises:
            ConfigError, ConfigFileError: As `from_file`.
        """
        from lightrft.config.yaml_format import load_yaml

        return cls._from_file("from_yaml", path, load_yaml)

    @classmethod
    def from_json(cls, path: str | Path) -> Self:
        """Read a JSON file of any name, as `from_file` does.

        Args:
            path: The file.

        Returns:
            The config.

        Raises:
            ConfigError, ConfigFileError: As `from_file`.
        """
        return cls._from_file("from_json", path, load_json)

    @classmethod
    def _from_file(cls, call: str, path: str | Path, load: Callable[[str], object] | None = None) -> Self:
        settings = read_file(f"StrategyConfig.{call}", path, load)
        with naming(path):
            return cls(**settings)

    @staticmethod
    def add_arguments(parser: "argparse.ArgumentParser") -> "argparse.ArgumentParser":
        """Add a command-line option for each setting to ``parser``.

        Hyphens may replace underscores. A flag (``--bf16``) has an opposite (``--no-bf16``). ``none`` is accepted where
        a setting may be None. Options that the parser already has are not replaced.

        ``--config FILE`` reads settings from a file, as `from_file` does. Its ``extra_args`` may name any option or
        positional argument of the script. Other options of the command line override the file, wherever they stand. A later
        file overrides an earlier one; mappings in both are merged. ``--engine.NAME VALUE`` sets a setting or an extra
        argument of rollout engines, and ``--engine.NAME.KEY VALUE`` one value in it.

        Args:
            parser: The parser. Pass what it parses to `from_args`. A parser that takes this one as one of its ``parents``
                does not read files: add the options to it directly.

        Returns:
            ``parser``.
        """
        import argparse

        from lightrft.config import arguments

        if not isinstance(parser, argparse.ArgumentParser):
            raise ConfigError(
                f"StrategyConfig.add_arguments: expected an argparse.ArgumentParser, got {shown(parser)}. Pass the parser of "
                f"the script"
            )
        return arguments.add_arguments(parser)

    # Queries

    @property
    def args(self) -> Any:
        """The object that `from_args` read, or this config if the constructor made it."""
        return self if self._source is None else self._source

    @property
    def from_script(self) -> bool:
        """Whether `from_args` made this config. If so, a setting that the strategy does not support warns; if not, it raises."""
        return self._source is not None

    def get_extra_arg(self, name: str, default: object = None) -> Any:
        """Return a value from ``extra_args``.

        Args:
            name: A name that is not a setting.
            default: The result if there is no such value.

        Returns:
            The value, or ``default``.
        """
        return self.extra_args.get(name, default)

    @classmethod
    def owner(cls, name: str) -> Owner:
        """Return the component that reads the setting ``name``."""
        return cast(Owner, cls._extra(name)["owner"])

    @classmethod
    def backend(cls, name: str) -> str | None:
        """Return the only strategy that has the setting ``name``, or None if all have it."""
        return cls._extra(name).get("backend")

    @classmethod
    def _extra(cls, name: str) -> dict[str, Any]:
        if name not in cls.model_fields:
            likely = nearest(str(name), cls.model_fields)
            remedy = f"Did you mean {likely!r}?" if likely else "Names are the fields of StrategyConfig"
            raise ConfigError(f"StrategyConfig: expected the name of a setting, got {shown(name)}. {remedy}")
        extra = cls.model_fields[name].json_schema_extra
        assert isinstance(extra, dict)
        return extra

    def changed(self) -> dict[str, Any]:
        """Return the settings that differ from their defaults, by name."""
        return {
            name: getattr(self, name)
            for name, field in type(self).model_fields.items()
            if getattr(self, name) != field.default
        }

    # Writing

    def replace(self, **changes: object) -> Self:
        """Return a copy with some settings changed. The copy keeps `args`.

        Args:
            changes: New values by setting name.

        Returns:
            The copy, validated.

        Raises:
            ConfigError: As the constructor.
        """
        copy = type(self)(**{**dict(self), **changes})
        copy._source = self._source
        return copy

    def overlaid(self, source: object) -> Self:
        """Return a copy in which the settings that ``source`` names are replaced.

        Args:
            source: Anything that `from_args` reads. A `StrategyConfig` is returned unchanged.

        Returns:
            The copy.

        Raises:
            ConfigError: As `from_args`.
        """
        given = type(self).from_args(source)
        if given is source:
            return given
        named = {name: getattr(given, name) for name in given.model_fields_set - {"extra_args"}}
        return self.replace(**named, extra_args={**self.extra_args, **given.extra_args})

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Return a copy. Unlike pydantic's, it validates ``update``, as `replace` does."""
        return super().model_copy(deep=deep) if not update else self.replace(**update)

    def to_dict(self) -> dict[str, Any]:
        """Return all settings by name. ``extra_args`` is left out if it is empty."""
        settings = dict(self)
        return settings if settings["extra_args"] else {k: v for k, v in settings.items() if k != "extra_args"}

    def to_json(self, path: str | Path) -> None:
        """Write all settings to a JSON file, for `from_json`.

        Args:
            path: The file. An existing file is replaced.

        Raises:
            ConfigError: ``extra_args`` has a value that a file cannot hold.
            ConfigFileError: The file cannot be written.
        """
        self._write("to_json", path, partial(json.dumps, indent=2, allow_nan=False))

    def to_yaml(self, path: str | Path) -> None:
        """Write all settings to a YAML file, for `from_yaml`.

        Args:
            path: The file. An existing file is replaced.

        Raises:
            ConfigError: ``extra_args`` has a value that a file cannot hold.
            ConfigFileError: The file cannot be written.
        """
        from lightrft.config.yaml_format import dump_yaml

        self._write("to_yaml", path, dump_yaml)

    def _write(self, call: str, path: str | Path, dump: Callable[[dict[str, object]], str]) -> None:
        call = f"StrategyConfig.{call}"
        file = as_path(call, path)
        check_serializable(self.extra_args, f"{path}: extra_args")
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in self.to_dict().items()}
        with file_errors(call, "write", file):
            file.write_text(dump(plain), encoding="utf-8")

    @classmethod
    def json_schema(cls) -> dict[str, Any]:
        """Return the JSON schema of the settings, with descriptions and owners."""
        return cls.model_json_schema()

    def summary(self) -> str:
        """Return a table of the settings that differ from their defaults: setting, value, default, owner."""
        rows = [
            ("setting", "value", "default", "owner"),
            *(
                (name, repr(value), repr(type(self).model_fields[name].default), self.owner(name))
                for name, value in self.changed().items()
                if name != "extra_args"
            ),
            *((f"extra_args[{name!r}]", repr(value), "", "trainer") for name, value in self.extra_args.items()),
        ]
        if len(rows) == 1:
            return "All settings have their default values."
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def _check_extra(extra: Mapping[str, object], *, raises: bool) -> None:
    """Raise for names that are probably misspelled settings, or warn."""
    likely = {name: setting for name in extra if (setting := near_miss(name, Settings.model_fields)) is not None}
    if likely and raises:
        raise combined_error(
            f"{name!r} is not a setting. Did you mean {setting!r}? If it is the script's own, pass it in extra_args"
            for name, setting in likely.items()
        )
    if os.environ.get("RANK", "0") != "0":  # warned of on rank 0
        return
    for name, setting in likely.items():
        warnings.warn(
            f"StrategyConfig.from_args: {name!r} is not a setting; it is kept in extra_args. Did you mean {setting!r}?",
            stacklevel=3,
        )


def _with_names(settings: Mapping[Any, Any], call: str) -> dict[str, Any]:
    for name in settings:
        if not isinstance(name, str):
            raise ConfigError(f"{call}: expected names that are strings, got {shown(name)}")
    return dict(settings)
