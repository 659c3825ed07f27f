"""What a rank does in `test_fsdp_sequences`."""

import os
from collections.abc import Callable
from typing import Any

import fsdp_cases
import sequences
from programs import Program

from lightrft.fsdp import FSDPV2Strategy

MAX_NORM = 0.5


def trained(kind: str, **settings: Any) -> Any:
    with FSDPV2Strategy(
        device="cpu", bf16=False, max_norm=MAX_NORM, train_batch_size=_data_ranks(), sp_size=2, **settings
    ) as made:
        return sequences.trained(made, kind)


def with_sharing(
    function: Callable[..., Any], engine_tp_size: int = 1, fused_linear_logprob: bool = False, **arguments: Any
) -> Any:
    settings = {"engine_tp_size": engine_tp_size, "fused_linear_logprob": fused_linear_logprob}
    with fsdp_cases.strategy(Program(accumulation_steps=1), sp_size=2, **settings) as made:
        return function(made, **arguments)


def generated() -> Any:
    with fsdp_cases.strategy(Program(), sp_size=2) as made:
        return sequences.generated(made)


def three_ranks_per_sequence() -> str:
    try:
        FSDPV2Strategy(device="cpu", sp_size=3)
    except ValueError as error:
        return str(error)
    raise AssertionError("no error")


def _data_ranks() -> int:
    return int(os.environ["WORLD_SIZE"]) // 2
