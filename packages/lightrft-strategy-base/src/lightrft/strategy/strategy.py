"""`get_strategy`: from settings to a strategy that is ready for use."""

from lightrft.config import StrategyConfig
from lightrft.strategy.registry import strategy_class, strategy_name
from lightrft.strategy.strategy_base import StrategyBase


def get_strategy(args: object = None) -> StrategyBase:
    """Make the strategy that the settings choose: ``strategy``, or, by "auto", ``fsdp``.

    ``args``: a `StrategyConfig`, an argparse Namespace, a mapping, or any object with attributes.

    Raises `BackendNotInstalledError`, with the pip command, for a strategy that is not installed, and
    `ConfigError` for one that nobody knows and for settings that it cannot honour.
    """
    config = StrategyConfig() if args is None else StrategyConfig.from_args(args)
    return strategy_class(strategy_name(config))(config)
