"""`get_strategy`: from settings to a strategy that is ready for use."""

import os
import time

from lightrft.config import ConfigError, StrategyConfig
from lightrft.strategy import supported_settings
from lightrft.strategy.registry import STRATEGIES, load
from lightrft.strategy.strategy_base import StrategyBase

HEAD_START = 10.0
"""Seconds that the other processes of a host wait while the first one reports an error that all of them have."""


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
            Under torchrun, the first process of each host raises at once and the others 10 seconds later: torchrun has ended
            them by then, so the error is printed once.
    """
    try:
        config = StrategyConfig() if args is None else StrategyConfig.from_args(args)
        strategy = strategy_class(strategy_name(config))(config)
    except ConfigError as error:
        _wait_for_first_process()
        raise error.with_traceback(None) from None
    supported_settings.warn_of_trainer_settings(strategy.config)
    return strategy


def _wait_for_first_process() -> None:
    """Wait, in the other processes of a host, until torchrun ends them because the first one has failed.

    If torchrun does not, because the first process caught the error or had none, they raise it themselves.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(HEAD_START)


def strategy_name(config: StrategyConfig) -> str:
    """Return the registered name that the settings select: "auto" is "fsdp" if ``fsdp`` is set, else "deepspeed"."""
    return config.strategy if config.strategy != "auto" else "fsdp" if config.fsdp else "deepspeed"


def strategy_class(name: str) -> type[StrategyBase]:
    """Return the strategy registered as ``name``, or found at ``module:attribute``."""
    return load(STRATEGIES, name, StrategyBase)
