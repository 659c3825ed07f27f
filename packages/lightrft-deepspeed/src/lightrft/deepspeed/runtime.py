"""What DeepSpeed keeps for the whole process, set up for one lifetime of a strategy and put back as it was found.

DeepSpeed caches a communication backend, process groups, an accelerator and a patched ``linear`` in module
globals, and has no call that gives them back: a second process group in the same process meets the groups of
the first ("Group not registered").
"""

import inspect
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import deepspeed.comm.comm as ds_comm
import torch
from deepspeed.accelerator import get_accelerator, real_accelerator
from deepspeed.runtime.zero import parameter_offload
from deepspeed.runtime.zero.linear import zero3_linear_wrap
from deepspeed.utils import groups

from lightrft.config import StrategyConfig
from lightrft.strategy.distributed.world import World

_ds_torch: Any = import_module("deepspeed.comm.torch")  # as an attribute of deepspeed.comm that name is torch itself
_KEPT = (
    (ds_comm, "cdb"),
    (groups, "_WORLD_GROUP"),
    (groups, "_ZERO_PARAM_INTRA_PARALLEL_GROUP"),
    (real_accelerator, "ds_accelerator"),
)
"""Module globals that DeepSpeed sets and does not unset; another is torch's ``linear``."""


def _forget_default_group() -> None:
    """Let DeepSpeed's barriers find the default group when they are called.

    Theirs is the default value of an argument: the group that was there when DeepSpeed was imported, of which a
    socket would stay open, and which a later lifetime could not use.
    """
    for name in ("barrier", "monitored_barrier"):
        function = inspect.unwrap(getattr(_ds_torch.TorchBackend, name))
        held = function.__defaults__ or ()
        function.__defaults__ = tuple(None if isinstance(it, torch.distributed.ProcessGroup) else it for it in held)


_forget_default_group()


@dataclass
class Runtime:
    """DeepSpeed's state in this process, between `open` and `close`."""

    _found: list[tuple[Any, str, Any]] = field(default_factory=list)
    _linear: Any = None
    _models: int = 0

    @classmethod
    def open(cls, config: StrategyConfig, world: World) -> "Runtime":
        """Choose the device, and join DeepSpeed to the process group that is there. Every rank calls it."""
        runtime = cls([(module, name, getattr(module, name)) for module, name in _KEPT])
        runtime._linear = torch.nn.functional.linear
        runtime._models = len(parameter_offload.FWD_MODULE_STACK)
        try:
            runtime._join(config, world)
        except BaseException:
            runtime.close()
            raise
        return runtime

    def _join(self, config: StrategyConfig, world: World) -> None:
        if get_accelerator().device_name() != world.device.type:
            real_accelerator.ds_accelerator = None  # chosen anew, from DS_ACCELERATOR
        groups._WORLD_GROUP = groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None
        _join_backend()
        # Made now, the groups have the strategy's timeout before a first collective runs in them.
        groups._clone_world_group()
        if config.zero_stage == 3 and config.zpg > 1:
            groups._create_zero_param_parallel_group(config.zpg)

    def close(self) -> None:
        """Put everything back."""
        for module, name, value in self._found:
            setattr(module, name, value)
        if torch.nn.functional.linear is zero3_linear_wrap:  # and not what somebody else made of it since
            torch.nn.functional.linear = self._linear
        # ZeRO-3 appends each model that it hooks, and never removes one.
        del parameter_offload.FWD_MODULE_STACK[self._models :]


def _join_backend() -> None:
    """Make DeepSpeed's communication backend over torch's default group, without its shared-memory operator.

    On the CPU that operator is compiled at first use (some 30 s, with g++ and ninja); it serves DeepSpeed's
    inference engine, and nothing in training calls it.
    """
    if ds_comm.cdb is not None:
        return
    original = _ds_torch.build_shm_op
    _ds_torch.build_shm_op = lambda: None
    try:
        ds_comm.init_distributed(dist_backend=get_accelerator().communication_backend_name())
    finally:
        _ds_torch.build_shm_op = original
    # DeepSpeed (0.19.8) knows these by the names that torch 2.13 deprecates.
    for attribute, name in (
        ("all_gather_function", "all_gather_single"),
        ("reduce_scatter_function", "reduce_scatter_single"),
    ):
        if hasattr(torch.distributed, name):
            setattr(ds_comm.cdb, attribute, getattr(torch.distributed, name))
