"""The extra arguments of engines. All are optional, and all are checked before an engine is built."""

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
    """Extra arguments, named without ``engine_``. None means that the engine decides."""

    kv_cache_bytes: int | None
    """Size of the key-value cache, in bytes."""
    max_model_len: int | None
    """The longest sequence in tokens, prompt included."""
    max_sequences: int | None
    """Sequences that are decoded together."""
    eager: bool | None
    """Whether to compile nothing and capture no graphs."""
    arguments: Mapping[str, Any]
    """The engine's own arguments, under its own names. They override the others."""
    media_limits: Mapping[str, int]
    """The most images ("image") and videos ("video") of one prompt, from ``limit_mm_image_per_prompt`` and
    ``limit_mm_video_per_prompt``; no entry for -1."""
    trust_remote_code: bool
    """Whether to run code that comes with the model."""
    verifies: bool
    """Whether to compare the engine's weights after a sync with those sent (``weight_sync_verify="checksum"``)."""

    @classmethod
    def of(cls, config: StrategyConfig) -> Self:
        """Read the extra arguments of ``config``. Raises `ConfigError` for a bad value; warns of an unknown name."""
        _warn_of_unknown_names(config)
        verify = config.get_extra_arg("weight_sync_verify", None)
        if verify not in (None, False, "", "none", "checksum"):
            raise ConfigError(f"weight_sync_verify: expected 'checksum' or 'none', got {verify!r}. Pass one of the two")
        limits = {media: _integer(config, f"limit_mm_{media}_per_prompt", minimum=-1) for media in ("image", "video")}
        return cls(
            kv_cache_bytes=_integer(config, "engine_kv_cache_bytes"),
            max_model_len=_integer(config, "engine_max_model_len"),
            max_sequences=_integer(config, "engine_max_sequences"),
            eager=_flag(config, "engine_eager"),
            arguments=_mapping(config, "engine_arguments"),
            media_limits={media: limit for media, limit in limits.items() if limit not in (None, -1)},
            trust_remote_code=bool(_flag(config, "trust_remote_code")),
            verifies=verify == "checksum",
        )


def _warn_of_unknown_names(config: StrategyConfig) -> None:
    for name in config.extra_args:
        if name.startswith(("engine_", "limit_mm_")) and name not in NAMES:
            likely = nearest(name, NAMES)
            hint = f"Did you mean {likely!r}?" if likely else f"Known are {', '.join(NAMES)}"
            warnings.warn(f"{name!r} is not an extra argument of engines and has no effect. {hint}", stacklevel=4)


def _integer(config: StrategyConfig, name: str, minimum: int = 1) -> int | None:
    given = config.get_extra_arg(name, None)
    if given is None:
        return None
    plain = int(given) if isinstance(given, str) and given.isdecimal() else given
    if isinstance(plain, bool) or not isinstance(plain, Integral) or plain < minimum:
        raise ConfigError(f"{name}: expected an integer >= {minimum}, got {given!r}. Change or remove it")
    return int(plain)


def _flag(config: StrategyConfig, name: str) -> bool | None:
    given = config.get_extra_arg(name, None)
    if given not in (None, True, False):
        raise ConfigError(f"{name}: expected True or False, got {given!r}. Pass a bool")
    return None if given is None else bool(given)


def _mapping(config: StrategyConfig, name: str) -> Mapping[str, Any]:
    given = config.get_extra_arg(name, None)
    if given is not None and not isinstance(given, Mapping):
        raise ConfigError(
            f"{name}: expected a mapping of the engine's own argument names to values, got {given!r}. Pass a dict"
        )
    return dict(given or {})
