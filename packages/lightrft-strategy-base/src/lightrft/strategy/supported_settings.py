"""Refusing what the chosen strategy or engine does not support: no setting is accepted and then ignored.

Settings of other backends are exempt, and so are settings that every strategy supports and those of the trainer. Of the
optional ones, a strategy lists what it supports in `StrategyBase.supported_settings`, an engine in
`EngineBase.supported_settings`.
"""

import warnings
from collections.abc import Collection, Iterable, Mapping

from lightrft.config import ConfigError, StrategyConfig
from lightrft.config.files import OF_ENGINES
from lightrft.strategy.telemetry.log import is_silent

OPTIONAL = frozenset({"grad_accum_dtype"})
"""Settings of any strategy that only some support."""
OPTIONAL_FOR_ENGINES = frozenset({"engine_mem_util"})
SAME_AS_DEFAULT = {"grad_accum_dtype": "fp32"}
"""Values that every strategy supports, because they are what it does by default."""


def unsupported(config: StrategyConfig, strategy: str, supported: Collection[str]) -> list[str]:
    """Return the settings that differ from their defaults and that ``strategy`` does not support."""
    return [
        name
        for name, value in config.changed().items()
        if name not in supported
        and SAME_AS_DEFAULT.get(name) != value
        and (name in OPTIONAL or (config.backend(name) is not None and config.backend(name) == strategy))
    ]


def validate(config: StrategyConfig, strategy: str, supported: Collection[str]) -> StrategyConfig:
    """Return ``config`` with the settings that ``strategy`` does not support reset to their defaults, with a warning.

    Raises:
        ConfigError: Instead of the warning, if the config was built directly.
    """
    names = unsupported(config, strategy, supported)
    if not names:
        return config
    message = _refusal(config, f"strategy {strategy!r}", names)
    _refuse(config, message, "choose another strategy")
    return config.replace(**{name: StrategyConfig.model_fields[name].default for name in names})


def validate_engine(config: StrategyConfig, engine: str, supported: Collection[str]) -> None:
    """Report what ``engine`` does not support: `ConfigError` if the config was built directly, else a warning."""
    names = sorted(OPTIONAL_FOR_ENGINES & config.changed().keys() - set(supported))
    if names:
        _refuse(config, _refusal(config, f"engine {engine!r}", names), "choose another engine")


def warn_of_unknown_names(config: StrategyConfig) -> None:
    """Warn once of the names in the mapping that ``config`` was read from that are neither settings nor engines'."""
    source = config.args
    if not isinstance(source, Mapping) or is_silent():
        return
    names = [name for name in source if name in config.extra_args and not OF_ENGINES.match(name)]
    if names:
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        warnings.warn(
            f"get_strategy: {', '.join(map(repr, names[:8]))}{more} are not settings and have no effect; they are kept in "
            f"extra_args. Correct them, or pass the script's own values as extra_args={{...}}",
            stacklevel=4,
        )


def warn_of_trainer_settings(config: StrategyConfig) -> None:
    """Warn once, in one line, of the settings that are set and that only a trainer such as LightRFT's reads."""
    names = [name for name in config.changed() if config.owner(name) == "trainer" and name != "extra_args"]
    if names and not is_silent():
        warnings.warn(
            f"get_strategy: {', '.join(names)} have no effect on the strategy, which only stores them in strategy.config for "
            f"a trainer such as LightRFT's",
            stacklevel=3,
        )


def _refusal(config: StrategyConfig, who: str, names: Iterable[str]) -> str:
    return f"{who} does not support {', '.join(f'{name}={getattr(config, name)!r}' for name in names)}"


def _refuse(config: StrategyConfig, message: str, alternative: str) -> None:
    if not config.from_script:
        raise ConfigError(f"{message}. Remove it, or {alternative}")
    if not is_silent():
        warnings.warn(f"{message}; it is ignored", stacklevel=5)
