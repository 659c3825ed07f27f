"""Refusing what the chosen strategy or engine does not support: no setting is accepted and then ignored.

Settings of other backends are exempt, and so are settings that every strategy supports and those of the trainer. Of the
optional ones, a strategy lists what it supports in `StrategyBase.supported_settings`, an engine in
`EngineBase.supported_settings`.
"""

import warnings
from collections.abc import Collection, Iterable

from lightrft.config import ConfigError, StrategyConfig
from lightrft.strategy.telemetry.log import is_silent

OPTIONAL = frozenset({"grad_accum_dtype", "sp_size"})
"""Settings of any strategy that only some support."""
OPTIONAL_FOR_ENGINES = frozenset({"engine_mem_util"})
SAME_AS_DEFAULT = {"grad_accum_dtype": "fp32"}
"""Values that every strategy supports, since they say what it does anyway."""


def unsupported(config: StrategyConfig, strategy: str, supported: Collection[str]) -> list[str]:
    """Return the settings that were changed from their defaults and that ``strategy`` would have to ignore."""
    return [
        name
        for name, value in config.changed().items()
        if name not in supported
        and SAME_AS_DEFAULT.get(name) != value
        and (name in OPTIONAL or (config.backend(name) is not None and config.backend(name) == strategy))
    ]


def validate(config: StrategyConfig, strategy: str, supported: Collection[str]) -> StrategyConfig:
    """Return ``config`` with what ``strategy`` does not support put back to its default, with a warning.

    Raises:
        ConfigError: Instead of the warning, if the config was built directly; and always for ``sp_size``, which
            changes the meaning of a batch.
    """
    names = unsupported(config, strategy, supported)
    if not names:
        return config
    message = _refusal(config, f"strategy {strategy!r}", names)
    if "sp_size" in names:
        raise ConfigError(f"{message}: sequence parallelism is not supported yet. Use sp_size=1")
    _refuse(config, message, "choose another strategy")
    return config.replace(**{name: StrategyConfig.model_fields[name].default for name in names})


def validate_engine(config: StrategyConfig, engine: str, supported: Collection[str]) -> None:
    """Report what ``engine`` does not support: `ConfigError` if the config was built directly, else a warning."""
    names = sorted(OPTIONAL_FOR_ENGINES & config.changed().keys() - set(supported))
    if names:
        _refuse(config, _refusal(config, f"engine {engine!r}", names), "choose another engine")


def _refusal(config: StrategyConfig, who: str, names: Iterable[str]) -> str:
    return f"{who} does not support {', '.join(f'{name}={getattr(config, name)!r}' for name in names)}"


def _refuse(config: StrategyConfig, message: str, alternative: str) -> None:
    if not config.from_script:
        raise ConfigError(f"{message}. Leave it out, or {alternative}")
    if not is_silent():
        warnings.warn(f"{message}; it is ignored", stacklevel=5)
