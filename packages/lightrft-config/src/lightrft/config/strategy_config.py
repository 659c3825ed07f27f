"""`StrategyConfig`: the settings, with the ways to read, check and write them."""

import argparse
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import PrivateAttr, ValidationError

from lightrft.config import arguments, validation
from lightrft.config.contradictions import contradictions
from lightrft.config.errors import ConfigError
from lightrft.config.names import near_miss
from lightrft.config.settings import Owner, Settings
from lightrft.config.sources import read


class StrategyConfig(Settings):
    """All settings of a run, frozen and checked.

    Built directly, it takes known names and exact types only, and raises `ConfigError` otherwise. Built with
    `from_args` it takes what scripts hold, and keeps what it does not know in `extra_args`.
    """

    _source: Any = PrivateAttr(default=None)

    def __init__(self, **settings: Any) -> None:
        try:
            super().__init__(**settings)
        except ValidationError as error:
            raise validation.config_error(error, settings) from None
        reasons = list(contradictions(self))
        if reasons:
            raise validation.refusal(reasons)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StrategyConfig) and dict(self) == dict(other)

    __hash__ = None  # type: ignore[assignment]  # extra_args is a dict

    def __setattr__(self, name: str, value: Any) -> None:
        if name in type(self).model_fields:
            raise ConfigError(
                f"{name}: a StrategyConfig does not change; make another: config.replace({name}={value!r})"
            )
        super().__setattr__(name, value)

    # Reading

    @classmethod
    def model_validate(cls, obj: object, **_: Any) -> Self:
        """Build one directly from a mapping, under pydantic's name. Raises `ConfigError`, as the constructor does."""
        if isinstance(obj, Mapping):
            return cls(**obj)
        if isinstance(obj, cls):
            return obj
        raise ConfigError(f"model_validate: got {obj!r} ({type(obj).__name__}); wanted settings by name, or from_args")

    @classmethod
    def from_args(cls, source: object) -> Self:
        """Read settings from an argparse Namespace, a mapping, a dataclass, a pydantic model or any object.

        Names that are no settings go to `extra_args`; one that looks like a misspelt setting warns. The
        object itself stays at `args`. A `StrategyConfig` is returned as it is.
        """
        if isinstance(source, cls):
            return source
        found = read(source)
        known = {name: value for name, value in found.items() if name in cls.model_fields and name != "extra_args"}
        extra = {name: value for name, value in found.items() if name not in cls.model_fields}
        nested = found.get("extra_args") or {}
        if not isinstance(nested, Mapping):
            raise ConfigError(f"extra_args: got {nested!r} ({type(nested).__name__}); allowed is a dict")
        _warn_of_near_misses(extra)
        config = cls(**known, extra_args={**extra, **nested})
        config._source = source
        return config

    @classmethod
    def from_yaml(cls, path: str | Path) -> Self:
        """Read a YAML file. Unknown names raise, as when built directly."""
        return cls._from_file(path, lambda text: yaml.load(text, Loader=arguments.YamlLoader), yaml.YAMLError)

    @classmethod
    def from_json(cls, path: str | Path) -> Self:
        """Read a JSON file. Unknown names raise, as when built directly."""
        return cls._from_file(
            path, lambda text: json.loads(text, object_pairs_hook=arguments.unique), json.JSONDecodeError
        )

    @classmethod
    def _from_file(cls, path: str | Path, parse: Any, syntax_error: type[Exception]) -> Self:
        try:
            content = parse(Path(path).read_text(encoding="utf-8"))
        except (syntax_error, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: cannot be read: {error}") from error
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error
        if content is None:
            content = {}
        if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
            raise ConfigError(f"{path}: holds {type(content).__name__}; wanted settings by name")
        return cls(**content)

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        """Add an option for each setting to ``parser``; read the result with `from_args`."""
        return arguments.add_arguments(parser)

    # Asking

    @property
    def args(self) -> Any:
        """The object that `from_args` read, or this config where it was built directly."""
        return self if self._source is None else self._source

    @property
    def from_script(self) -> bool:
        """Whether `from_args` read this: then what a strategy cannot honour warns, and otherwise raises."""
        return self._source is not None

    def get_extra_arg(self, name: str, default: Any = None) -> Any:
        """The value that `from_args` found under ``name``, which is no setting, or ``default``."""
        return self.extra_args.get(name, default)

    @classmethod
    def owner(cls, name: str) -> Owner:
        """Who reads the setting ``name``."""
        owner: Owner = cls._extra(name)["owner"]
        return owner

    @classmethod
    def backend(cls, name: str) -> str | None:
        """The one strategy that has the setting ``name``, or None where all have it."""
        return cls._extra(name).get("backend")

    @classmethod
    def _extra(cls, name: str) -> dict[str, Any]:
        extra = cls.model_fields[name].json_schema_extra
        assert isinstance(extra, dict)
        return extra

    def changed(self) -> dict[str, Any]:
        """The settings that differ from their defaults, by name."""
        return {
            name: getattr(self, name)
            for name, field in type(self).model_fields.items()
            if getattr(self, name) != field.default
        }

    # Writing

    def replace(self, **changes: Any) -> Self:
        """A copy with some settings changed, checked like a new one; it remembers where it came from."""
        copy = type(self)(**{**dict(self), **changes})
        copy._source = self._source
        return copy

    def overlaid(self, source: object) -> Self:
        """A copy with the settings that ``source``, read as by `from_args`, names; a whole config is returned as it is."""
        given = type(self).from_args(source)
        if given is source:
            return given
        named = {name: getattr(given, name) for name in given.model_fields_set - {"extra_args"}}
        return self.replace(**named, extra_args={**self.extra_args, **given.extra_args})

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """`replace`, under pydantic's name; what pydantic's own does not, it checks ``update``."""
        return super().model_copy(deep=deep) if not update else self.replace(**update)

    def to_dict(self) -> dict[str, Any]:
        """All settings by name, as plain values; `extra_args` only where there are any."""
        settings = dict(self)
        return settings if settings["extra_args"] else {k: v for k, v in settings.items() if k != "extra_args"}

    def to_json(self, path: str | Path) -> None:
        """Write all settings to a file that `from_json` reads."""
        self._write(path, lambda settings: json.dumps(settings, indent=2, allow_nan=False))

    def to_yaml(self, path: str | Path) -> None:
        """Write all settings to a file that `from_yaml` reads."""
        self._write(
            path, lambda settings: yaml.dump(settings, Dumper=arguments.YamlDumper, sort_keys=False, allow_unicode=True)
        )

    def _write(self, path: str | Path, render: Any) -> None:
        arguments.check_plain(self.extra_args, f"{path}: extra_args")
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in self.to_dict().items()}
        Path(path).write_text(render(plain), encoding="utf-8")

    @classmethod
    def json_schema(cls) -> dict[str, Any]:
        """JSON schema of the settings, with their descriptions and owners."""
        return cls.model_json_schema()

    def summary(self) -> str:
        """What differs from the defaults, as a table: setting, value, default, owner."""
        rows = [("setting", "value", "default", "owner")]
        for name, value in self.changed().items():
            if name != "extra_args":
                rows.append((name, repr(value), repr(type(self).model_fields[name].default), self.owner(name)))
        rows += [(f"extra_args[{name!r}]", repr(value), "", "trainer") for name, value in self.extra_args.items()]
        if len(rows) == 1:
            return "All settings have their defaults."
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def _warn_of_near_misses(extra: Mapping[str, Any]) -> None:
    for name in extra:
        likely = near_miss(name, Settings.model_fields)
        if likely:
            warnings.warn(
                f"StrategyConfig.from_args: {name!r} is not a setting and was kept in extra_args; "
                f"did you mean {likely!r}?",
                stacklevel=3,
            )
