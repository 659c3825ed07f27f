"""What a rank does in `test_deepspeed_lifetimes`."""

import time
from typing import Any

import ds_cases
import pytest
import torch
import torch.distributed as dist
from programs import RATE, Program, loss_of, mixed, tokens
from torch import nn
from traces import traces

from lightrft.config import StrategyError


def _traces() -> dict[str, Any]:
    """What is there, with what DeepSpeed might leave."""
    from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK

    return {
        **traces(),
        "linear": torch.nn.functional.linear.__module__,
        "models": len(FWD_MODULE_STACK),
    }


def lives(stages: tuple[int, ...]) -> list[dict[str, Any]]:
    """One lifetime for each stage, with an actor, a critic and a reference model; what is there after each.

    The models outlive their strategies.
    """
    got = []
    models: list[nn.Module] = []
    for stage in stages:
        with ds_cases.strategy(Program(), persist=False, zero_stage=stage) as made:
            for seed in (1, 2):
                model: nn.Module = mixed(seed)
                model, optimizer, _ = made.prepare((model, made.create_optimizer(model, lr=RATE), None))
                made.backward(loss_of(model, tokens(seed)), model, optimizer)
                assert made.optimizer_step(optimizer, model).applied
                models.append(model)
            models.append(made.prepare(mixed()))
            models[-1](tokens(0))
        got.append(_traces())
    return got


def memory_of_lives(count: int) -> list[int]:
    """Elements of all tensors that are alive after each of ``count`` lifetimes, with their models gone."""
    import gc

    got = []
    for _ in range(count):
        for stage in (0, 1, 2, 3):
            lives((stage,))
        gc.collect()
        alive = [item for item in gc.get_objects() if isinstance(item, torch.Tensor)]
        got.append(sum(tensor.numel() for tensor in alive))
    return got


def in_the_callers_group(stage: int) -> tuple[bool, float]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with ds_cases.strategy(Program(), zero_stage=stage) as made:
            model: nn.Module = mixed()
            model, optimizer, _ = made.prepare((model, made.create_optimizer(model, lr=RATE), None))
            made.backward(loss_of(model, tokens(0)), model, optimizer)
            applied = made.optimizer_step(optimizer, model).applied
        total = torch.ones(1)
        dist.all_reduce(total)
        return applied, total.item()
    finally:
        dist.destroy_process_group()


def groups_and_timeouts(stage: int) -> tuple[int, set[float]]:
    """How many process groups preparing added, and the timeouts of all, in seconds."""
    with ds_cases.strategy(Program(), zero_stage=stage, timeout=17.0, zpg=2 if stage == 3 else 1) as made:
        before = len(dist.distributed_c10d._world.pg_map)
        model = mixed()
        made.prepare((model, made.create_optimizer(model, lr=RATE), None))
        groups = list(dist.distributed_c10d._world.pg_map)
        backends = [group._get_backend(torch.device("cpu")) for group in groups]
        return len(groups) - before, {backend.options._timeout.total_seconds() for backend in backends}


def failing_in_a_forward() -> tuple[str, str]:
    """The class and the beginning of the error on each rank if rank 1 has a token outside the vocabulary, with ZeRO-3."""
    try:
        with ds_cases.strategy(Program(), persist=False, zero_stage=3, timeout=5.0) as made:
            model: nn.Module = mixed()
            model, _, _ = made.prepare((model, made.create_optimizer(model, lr=RATE), None))
            model(tokens(0) + 1_000_000 * made.get_rank())
    except Exception as error:  # noqa: BLE001 - it is what is tested
        return type(error).__name__, str(error)[:60]
    raise AssertionError("no error")


def left_alone(stage: int, call: str) -> tuple[str, float]:
    with ds_cases.strategy(Program(), persist=False, zero_stage=stage, timeout=3.0) as made:
        model: nn.Module = mixed()
        model, optimizer, _ = made.prepare((model, made.create_optimizer(model, lr=RATE), None))
        loss = loss_of(model, tokens(0))
        if call == "optimizer_step":
            made.backward(loss, model, optimizer)
        if made.get_rank() == 1:
            time.sleep(4)
            return "", 0.0
        begin = time.monotonic()
        with pytest.raises(StrategyError) as caught:
            made.backward(loss, model, optimizer) if call == "backward" else made.optimizer_step(optimizer, model)
        return str(caught.value), time.monotonic() - begin
