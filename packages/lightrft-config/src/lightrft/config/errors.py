"""The errors that every LightRFT package raises.

One root, so that ``except LightRFTError`` catches all of them; and each is also the standard type that
people already catch, so that ``except ValueError`` around a configuration keeps working.
"""


class LightRFTError(Exception):
    """Root of every error raised on purpose by a LightRFT package."""


class ConfigError(LightRFTError, ValueError):
    """A setting is unknown, ill-typed, out of range, or contradicts another one."""


class ArgumentError(LightRFTError, ValueError):
    """An argument of a call has a value that the call does not take."""


class ArgumentTypeError(LightRFTError, TypeError):
    """An argument of a call has a type or dtype that the call does not take."""


class BackendNotInstalledError(LightRFTError, ImportError):
    """A strategy or an engine was asked for whose package is not installed."""


class StrategyError(LightRFTError, RuntimeError):
    """A strategy was used in a way, or met a state, in which it cannot go on."""


class CheckpointError(LightRFTError, RuntimeError):
    """A checkpoint is damaged, incomplete, or does not fit what it is loaded into."""


class CheckpointNotFoundError(LightRFTError, FileNotFoundError):
    """There is no such checkpoint."""


class EngineError(LightRFTError, RuntimeError):
    """A rollout engine refused or failed a call."""


class StaleWeightsError(EngineError):
    """The engine does not hold the weights that it should generate from."""


class UnsupportedOperationError(LightRFTError, NotImplementedError):
    """The chosen strategy or engine cannot do what was asked, and says so."""
