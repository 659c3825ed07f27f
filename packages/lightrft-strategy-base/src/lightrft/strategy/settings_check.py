"""Refusing what the chosen strategy cannot honour: no setting is taken and then ignored.

Settings of another backend are exempt; those that every strategy has, and those of the engine and of the
trainer, are not this check's business. The rest, optional powers, a strategy lists in `Backend.honours`.
"""

import warnings
from collections.abc import Iterable
from typing import Any

from lightrft.config import ConfigError, StrategyConfig
from lightrft.strategy.backend import Backend
from lightrft.strategy.log import logger

OPTIONAL = frozenset({"grad_accum_dtype", "sp_size"})
"""Settings of any strategy that only some can honour."""
OF_SOME_ENGINES = frozenset({"engine_mem_util"})
ALREADY_SO = {"grad_accum_dtype": "fp32"}
"""Values that every strategy honours by what it does anyway."""


def unhonoured(config: StrategyConfig, backend: type[Backend]) -> list[str]:
    """The changed settings that ``backend`` would have to ignore."""
    return [
        name
        for name, value in config.changed().items()
        if name not in backend.honours
        and ALREADY_SO.get(name) != value
        and (name in OPTIONAL or (config.backend(name) is not None and config.backend(name) == backend.name))
    ]


def honourable(config: StrategyConfig, backend: type[Backend]) -> StrategyConfig:
    """``config`` with what ``backend`` cannot honour put back to its default, with a warning.

    Raises `ConfigError` instead where the config was built directly, and always for ``sp_size``, which
    changes the meaning of the batch.
    """
    names = unhonoured(config, backend)
    if not names:
        return config
    message = _refusal(config, f"strategy {backend.name!r}", names)
    if "sp_size" in names:
        raise ConfigError(f"{message}: sequence parallelism is not supported yet; use sp_size=1")
    _refuse(config, message, "choose another strategy")
    return config.replace(**{name: StrategyConfig.model_fields[name].default for name in names})


def check_engine(config: StrategyConfig, name: str, engine: type[Any]) -> None:
    """Say what ``engine`` cannot honour: `ConfigError` where the config was built directly, else a warning."""
    names = sorted(OF_SOME_ENGINES & config.changed().keys() - engine.honours)
    if names:
        _refuse(config, _refusal(config, f"engine {name!r}", names), "choose another engine")


def _refusal(config: StrategyConfig, who: str, names: Iterable[str]) -> str:
    return f"{who} cannot honour {', '.join(f'{name}={getattr(config, name)!r}' for name in names)}"


def _refuse(config: StrategyConfig, message: str, otherwise: str) -> None:
    if not config.from_script:
        raise ConfigError(f"{message}; leave it out, or {otherwise}")
    if logger.filter(logger.makeRecord(logger.name, 30, __file__, 0, message, (), None)):
        warnings.warn(f"{message}; going on without", stacklevel=5)
