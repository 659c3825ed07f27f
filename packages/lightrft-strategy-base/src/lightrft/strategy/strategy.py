"""`get_strategy`: from settings to a strategy that is ready for use."""

from lightrft.config import ConfigError, StrategyConfig
from lightrft.strategy import supported_settings
from lightrft.strategy.registry import STRATEGIES, load
from lightrft.strategy.strategy_base import StrategyBase


def get_strategy(args: object = None) -> StrategyBase:
    """Create the strategy that the settings select.

    All ranks must call this.

    Args:
        args: A `StrategyConfig`, an argparse Namespace, a mapping, or any object with attributes. Its ``strategy`` is a
            registered name or ``module:attribute``; "auto" means "fsdp" if ``fsdp`` is set, else "deepspeed".

    Raises:
        BackendNotInstalledError: The strategy is not installed; the message has the pip command.
        ConfigError: There is no such strategy, it does not support a setting, or a name in a mapping is a misspelled
            setting. Other names that are not settings are warned of once, and so are settings that only a trainer reads.
    """
    try:
        config = StrategyConfig() if args is None else StrategyConfig.from_args(args)
        strategy = strategy_class(strategy_name(config))(config)
    except ConfigError as error:  # every rank prints it: without the frames below this one
        raise error.with_traceback(None) from None
    supported_settings.warn_of_trainer_settings(strategy.config)
    return strategy


def strategy_name(config: StrategyConfig) -> str:
    """Return the registered name that the settings select: "auto" is "fsdp" if ``fsdp`` is set, else "deepspeed"."""
    return config.strategy if config.strategy != "auto" else "fsdp" if config.fsdp else "deepspeed"


def strategy_class(name: str) -> type[StrategyBase]:
    """Return the strategy registered as ``name``, or found at ``module:attribute``."""
    return load(STRATEGIES, name, StrategyBase)
