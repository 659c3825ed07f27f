"""The extra arguments that engines read, all optional, each checked before an engine is built."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Self

from lightrft.config import ConfigError, StrategyConfig, nearest

NAMES = (
    "engine_kv_cache_bytes", "engine_max_model_len", "engine_max_sequences", "engine_eager", "engine_arguments",
    "limit_mm_image_per_prompt", "limit_mm_video_per_prompt",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """Extra arguments by their names without ``engine_``. None: the engine decides."""

    kv_cache_bytes: int | None
    """Of the cache of keys and values."""
    max_model_len: int | None
    """Tokens of the longest sequence, prompt and all."""
    max_sequences: int | None
    """That are decoded together."""
    eager: bool | None
    """Compile nothing, and capture no graphs."""
    arguments: Mapping[str, Any]
    """The engine's own arguments by its own names; they win."""
    media_limits: Mapping[str, int]
    """Pictures ("image") and videos ("video") of one prompt: ``limit_mm_image_per_prompt`` and its like, where they
    are not -1."""
    trust_remote_code: bool
    """Run code that comes with the model."""
    verifies: bool
    """Compare the weights that an engine holds after a sync with those sent: ``weight_sync_verify="checksum"``."""

    @classmethod
    def of(cls, config: StrategyConfig) -> Self:
        """Raises `ConfigError` for a value that means nothing; warns of a name that does."""
        _warn_of_strange_names(config)
        asked = config.get_extra_arg("weight_sync_verify", None)
        if asked not in (None, False, "", "none", "checksum"):
            raise ConfigError(f"weight_sync_verify={asked!r}; allowed is 'checksum', or nothing")
        limits = {kind: _number(config, f"limit_mm_{kind}_per_prompt", least=-1) for kind in ("image", "video")}
        return cls(
            kv_cache_bytes=_number(config, "engine_kv_cache_bytes"),
            max_model_len=_number(config, "engine_max_model_len"),
            max_sequences=_number(config, "engine_max_sequences"),
            eager=_flag(config, "engine_eager"),
            arguments=_mapping(config, "engine_arguments"),
            media_limits={kind: limit for kind, limit in limits.items() if limit not in (None, -1)},
            trust_remote_code=bool(_flag(config, "trust_remote_code")),
            verifies=asked == "checksum",
        )


def _warn_of_strange_names(config: StrategyConfig) -> None:
    for name in config.extra_args:
        if name.startswith(("engine_", "limit_mm_")) and name not in NAMES:
            likely = nearest(name, NAMES)
            hint = f"; did you mean {likely!r}?" if likely else f"; there are {', '.join(NAMES)}"
            warnings.warn(f"{name!r} is no extra argument of engines, and does nothing{hint}", stacklevel=4)


def _number(config: StrategyConfig, name: str, least: int = 1) -> int | None:
    given = config.get_extra_arg(name, None)
    if given is None:
        return None
    plain = int(given) if isinstance(given, str) and given.isdecimal() else given
    if isinstance(plain, bool) or not isinstance(plain, Integral) or plain < least:
        raise ConfigError(f"{name}={given!r}; allowed is a whole number, {least} or more")
    return int(plain)


def _flag(config: StrategyConfig, name: str) -> bool | None:
    given = config.get_extra_arg(name, None)
    if given not in (None, True, False):
        raise ConfigError(f"{name}={given!r}; allowed are True and False")
    return None if given is None else bool(given)


def _mapping(config: StrategyConfig, name: str) -> Mapping[str, Any]:
    given = config.get_extra_arg(name, None)
    if given is not None and not isinstance(given, Mapping):
        raise ConfigError(f"{name}={given!r}; allowed is a mapping of the engine's own arguments by its own names")
    return dict(given or {})
