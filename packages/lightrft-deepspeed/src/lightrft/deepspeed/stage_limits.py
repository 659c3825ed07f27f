"""Settings that the chosen ZeRO stage does not support: found before anything is built."""

import warnings
from collections.abc import Iterator

from lightrft.config import ConfigError, StrategyConfig
from lightrft.strategy.backend import World


def unsupported(config: StrategyConfig, ranks: int) -> Iterator[tuple[str, str]]:
    """Yield the name of each setting that the stage does not support on ``ranks`` ranks, and why, with the remedy."""
    stage = config.zero_stage
    if config.overlap_comm and stage < 2:
        yield (
            "overlap_comm",
            f"gradients are reduced during backward from zero_stage 2 on, and zero_stage is {stage}. Leave it out, or use "
            f"zero_stage=2",
        )
    if config.zpg > 1 and stage != 3:
        yield (
            "zpg",
            f"parameters have a secondary partition at zero_stage 3 only, and zero_stage is {stage}. Leave it out, or use "
            f"zero_stage=3",
        )
    elif ranks % config.zpg:
        yield "zpg", f"{ranks} ranks do not divide into partitions of {config.zpg}. Use a divisor of {ranks}"
    if config.grad_accum_dtype == "bf16" and stage == 0:
        yield "grad_accum_dtype", "zero_stage 0 accumulates in fp32. Leave it out, or use zero_stage=1"


def validate(config: StrategyConfig, world: World) -> StrategyConfig:
    """Return ``config`` with unsupported settings reset to their defaults, with a warning on rank 0.

    All ranks return the same.

    Raises:
        ConfigError: Instead of the warning, if the config was built directly and not read from a script's arguments.
    """
    reasons = dict(unsupported(config, world.size))
    if not reasons:
        return config
    refused = "; ".join(f"{name}={getattr(config, name)!r}: {reason}" for name, reason in reasons.items())
    message = f"strategy 'deepspeed' does not support {refused}"
    if not config.from_script:
        raise ConfigError(message)
    if world.rank == 0:
        warnings.warn(f"{message}; it is ignored", stacklevel=6)
    return config.replace(**{name: StrategyConfig.model_fields[name].default for name in reasons})
