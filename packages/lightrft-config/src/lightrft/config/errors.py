"""The exceptions that every LightRFT package raises.

All inherit from `LightRFTError`. Each one also inherits from the built-in exception that callers already handle, so
``except ValueError`` around a configuration catches a `ConfigError`.
"""


class LightRFTError(Exception):
    """Base class of every exception that a LightRFT package raises deliberately."""


class ConfigError(LightRFTError, ValueError):
    """A setting is unknown, has the wrong type, is out of range, or conflicts with another setting."""

    messages: tuple[str, ...] = ()
    """One message for each invalid setting or conflict; empty if no settings could be read."""


class ConfigFileError(ConfigError, OSError):
    """A file of settings cannot be read or written."""


class ArgumentError(LightRFTError, ValueError):
    """An argument of a call has an invalid value."""


class ArgumentTypeError(LightRFTError, TypeError):
    """An argument of a call has an invalid type or dtype."""


class BackendNotInstalledError(LightRFTError, ImportError):
    """The package of the requested strategy or engine is not installed."""


class StrategyError(LightRFTError, RuntimeError):
    """A strategy was used incorrectly, or reached a state from which it cannot continue."""


class CheckpointError(LightRFTError, RuntimeError):
    """A checkpoint is damaged, incomplete, or incompatible with the objects it is loaded into."""


class CheckpointNotFoundError(LightRFTError, FileNotFoundError):
    """The requested checkpoint does not exist."""


class EngineError(LightRFTError, RuntimeError):
    """A rollout engine rejected a call or failed during it."""


class StaleWeightsError(EngineError):
    """The engine does not hold the current weights of the model."""


class UnsupportedOperationError(LightRFTError, NotImplementedError):
    """The chosen strategy or engine does not support the operation."""
