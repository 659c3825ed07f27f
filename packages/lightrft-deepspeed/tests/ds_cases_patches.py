"""What a process does in `test_deepspeed_patches`."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import ds_cases
import pytest
import torch.distributed as dist
from programs import RATE, Program, loss_of, mixed, tokens
from removal import remove
from torch import nn

from lightrft.config import LightRFTError
from lightrft.deepspeed import DeepspeedStrategy, patches
from lightrft.deepspeed.patches import CPU_INFO, PATCHES, PROCESS, USED, USED_BY_ADAM_OFFLOAD
from lightrft.strategy.patching import Target

OFFLOAD = [CPU_INFO, *USED_BY_ADAM_OFFLOAD]
TARGETS = [*PATCHES, *USED, *OFFLOAD]


def message_without_each_target() -> dict[str, str]:
    """What making a strategy raises where DeepSpeed lacks one target and has all others."""
    _import_deepspeed()
    return {target.target: _message_without(target) for target in TARGETS}


def _message_without(target: Target) -> str:
    patches.require_deepspeed.cache_clear()
    with pytest.MonkeyPatch.context() as monkeypatch:
        remove(target, TARGETS, monkeypatch)
        message, left = _failure(zero_stage=1, adam_offload=target in OFFLOAD)
    assert left == [], target
    return message


def _failure(**settings: Any) -> tuple[str, list[str]]:
    """What making a strategy raises, and what the failure left in this process."""
    before = _globals()
    with pytest.raises((LightRFTError, RuntimeError)) as caught:
        DeepspeedStrategy(device="cpu", bf16=False, **settings).close()
    left = [name for name, value in _globals().items() if value is not before[name]]
    if dist.is_initialized():
        left.append("process group")
    return str(caught.value), left + [name for name in os.environ if name == "DS_ACCELERATOR"]


def _import_deepspeed() -> None:
    """Import DeepSpeed for this device."""
    with ds_cases.strategy(Program(), zero_stage=0):
        pass


def _globals() -> dict[str, object]:
    """What DeepSpeed keeps for the process."""
    return {patch.target: getattr(patch.owner(), patch.name) for patch in PROCESS if patch.missing() is None}


def changed_globals(stage: int) -> tuple[list[str], list[str]]:
    """Names of the globals that differ while a strategy is open, and after it was closed."""
    _import_deepspeed()
    before = _globals()
    with ds_cases.strategy(Program(), zero_stage=stage) as made:
        model: nn.Module = mixed()
        model, optimizer, _ = made.prepare((model, made.create_optimizer(model, lr=RATE), None))
        made.backward(loss_of(model, tokens(0)), model, optimizer)
        made.optimizer_step(optimizer, model)
        during = {patch.target: getattr(patch.owner(), patch.name) for patch in PROCESS}
    after = _globals()
    return tuple(
        [name.rpartition(":")[2] for name, value in values.items() if value is not before[name]]
        for values in (during, after)
    )


def failing_half_way() -> tuple[str, list[str]]:
    """A constructor that raises after it has joined the process group."""

    def fails() -> None:
        raise RuntimeError("no group")

    _import_deepspeed()
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("deepspeed.utils.groups._clone_world_group", fails)
        return _failure(zero_stage=2)


def failing_after_the_backend_was_made() -> tuple[str, list[str]]:
    _import_deepspeed()
    return _failure(zero_stage=2, train_batch_size=3, micro_train_batch_size=1)


@contextmanager
def _in_training(stage: int) -> Iterator[tuple[Any, Any]]:
    with ds_cases.strategy(Program(), zero_stage=stage) as made:
        model: nn.Module = mixed()
        model, _, _ = made.prepare((model, made.create_optimizer(model, lr=RATE), None))
        engine = made.backend.engines[model]  # type: ignore[attr-defined]
        yield engine, engine.optimizer


def patched_objects(stage: int) -> tuple[list[str], list[str]]:
    """Names of the methods that are replaced on an engine or its optimizer, while it trains and afterwards."""
    names = ("_backward_epilogue", "get_grad_norm_direct")
    with _in_training(stage) as objects:
        during = [name for name in names if any(name in vars(part) for part in objects)]
    return during, [name for name in names if any(name in vars(part) for part in objects)]


def times_checked() -> int:
    """How often two strategies, one after the other, check DeepSpeed."""
    patches.require_deepspeed.cache_clear()
    calls: list[object] = []
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(patches, "require", lambda *args: calls.append(args))
        for stage in (0, 1):
            with ds_cases.strategy(Program(), zero_stage=stage):
                pass
    return len(calls)


def default_groups() -> list[str]:
    """Classes of the process groups among the default values of the barriers that DeepSpeed defined while a group existed."""
    with ds_cases.strategy(Program(), zero_stage=0):
        backend = import_module("deepspeed.comm.torch").TorchBackend
        values = (*backend.barrier.__defaults__, *backend.monitored_barrier.__defaults__)
    return [type(value).__name__ for value in values if isinstance(value, dist.ProcessGroup)]
