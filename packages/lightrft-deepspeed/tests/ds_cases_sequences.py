"""What a rank does in `test_deepspeed_sequences`."""

from typing import Any

import ds_cases
import sequences
from programs import Program

MAX_NORM = 0.5


def trained(kind: str, **settings: Any) -> Any:
    with ds_cases.Unkept(
        device="cpu", bf16=False, max_norm=MAX_NORM, train_batch_size=1, sp_size=2, **settings
    ) as made:
        return sequences.trained(made, kind)


def generated(**settings: Any) -> Any:
    with ds_cases.strategy(Program(), sp_size=2, **settings) as made:
        return sequences.generated(made)


def mistaken(what: str, **settings: Any) -> Any:
    with ds_cases.strategy(Program(), sp_size=2, **settings) as made:
        return sequences.mistaken(made, what)
