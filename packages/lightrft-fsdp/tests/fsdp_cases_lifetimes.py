"""What a rank does in `test_fsdp_lifetimes`."""

import os
import signal
import time
from typing import Any

import fsdp_cases
import pytest
import training
from fsdp_models import layered
from programs import Program, tokens
from torch import nn
from traces import traces

from lightrft.config import StrategyError


def lives(sizes: tuple[int, ...]) -> list[dict[str, Any]]:
    """One lifetime for each ``fsdp_shard_size``, with an actor, a critic and a reference model; what is there after.

    The models outlive their strategies.
    """
    got: list[dict[str, Any]] = []
    models: list[nn.Module] = []
    for size in sizes:
        program = Program(updates=1)
        with fsdp_cases.strategy(program, fsdp_shard_size=size) as made:
            for seed in (1, 2):
                model, optimizer = fsdp_cases.prepared(made, layered(seed))
                assert all(result.applied for result in training.run(program, made, model, optimizer))
                models.append(model)
            models.append(made.prepare(layered()))
            models[-1](tokens(0))
        got.append(traces())
    return got


def left_alone(call: str) -> tuple[str, float]:
    """What rank 0 is told, and after how many seconds, where rank 1 does not come to ``call``."""
    program = Program()
    with fsdp_cases.strategy(program, timeout=3.0) as made:
        model, optimizer = fsdp_cases.prepared(made)
        if call == "forward" and made.get_rank() == 0:
            return _refused(lambda: model(tokens(0)))
        loss = None if call == "forward" else program.loss(model, 0, 0, made.get_rank())
        if call == "optimizer_step":
            made.backward(loss, model, optimizer)
        if made.get_rank() == 1:
            time.sleep(5)
            return "", 0.0
        return _refused(
            lambda: (
                made.backward(loss, model, optimizer) if call == "backward" else made.optimizer_step(optimizer, model)
            )
        )


def _refused(action: Any) -> tuple[str, float]:
    begin = time.monotonic()
    with pytest.raises(StrategyError) as caught:
        action()
    return str(caught.value), time.monotonic() - begin


def killed_in_a_step() -> None:
    """Rank 1 is killed between backward and the update."""
    program = Program()
    with fsdp_cases.strategy(program, timeout=10.0) as made:
        model, optimizer = fsdp_cases.prepared(made)
        made.backward(program.loss(model, 0, 0, made.get_rank()), model, optimizer)
        if made.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        made.optimizer_step(optimizer, model)
