"""What the chosen ZeRO stage cannot honour of the settings: found before anything is built."""

import warnings
from collections.abc import Iterator

from lightrft.config import ConfigError, StrategyConfig
from lightrft.strategy.distributed.world import World


def unsupported(config: StrategyConfig, ranks: int) -> Iterator[tuple[str, str]]:
    """Name of each setting that this stage, on so many ranks, cannot honour, and why, with the remedy."""
    stage = config.zero_stage
    if config.overlap_comm and stage < 2:
        yield "overlap_comm", f"gradients are reduced during backward from zero_stage 2 on, and zero_stage is {stage}"
    if config.zpg > 1 and stage != 3:
        yield "zpg", f"parameters have a secondary partition at zero_stage 3 only, and zero_stage is {stage}"
    elif ranks % config.zpg:
        yield "zpg", f"{ranks} ranks do not divide into partitions of {config.zpg}; use a divisor of {ranks}"
    if config.grad_accum_dtype == "bf16" and stage == 0:
        yield "grad_accum_dtype", "zero_stage 0 accumulates in fp32; use a higher stage or leave it out"


def honourable(config: StrategyConfig, world: World) -> StrategyConfig:
    """``config`` with what its stage cannot honour put back to the default, with a warning on rank 0.

    Raises `ConfigError` instead where the config was built directly. Every rank comes to the same.
    """
    found = dict(unsupported(config, world.size))
    if not found:
        return config
    reasons = "; ".join(f"{name}={getattr(config, name)!r}: {reason}" for name, reason in found.items())
    if not config.from_script:
        raise ConfigError(f"strategy 'deepspeed' cannot honour {reasons}")
    if world.rank == 0:
        warnings.warn(f"strategy 'deepspeed' cannot honour {reasons}; going on without", stacklevel=6)
    return config.replace(**{name: StrategyConfig.model_fields[name].default for name in found})
