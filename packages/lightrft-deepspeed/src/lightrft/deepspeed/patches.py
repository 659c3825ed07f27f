"""Every patch of DeepSpeed, and of torch and py-cpuinfo for DeepSpeed; and the other internals that we use.

`require_deepspeed` checks both when the backend is made, so that a name that DeepSpeed drops is an error there. Importing
this module loads no DeepSpeed.
"""

import functools
import inspect
import os
from collections.abc import Callable
from contextlib import ExitStack
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist

from lightrft.strategy.patching import Patch, Target, around, require

_SOURCE = "https://github.com/deepspeedai/DeepSpeed/blob/v0.19.8"
_SUPPORTED = ">=0.19.8"

# Globals that DeepSpeed sets once for the process and never resets. A second process group in the same process would meet
# the groups of the first ("Group not registered"). Applying a patch notes the value, undoing it puts the value back.

WORLD_GROUP = Patch(
    target="deepspeed.utils.groups:_WORLD_GROUP",
    replacement=lambda group: None,
    why="DeepSpeed keeps its copy of the world group, which is destroyed with the strategy's process groups",
    upstream=f"{_SOURCE}/deepspeed/utils/groups.py#L723-L735",
    versions="0.19.8",
    until="DeepSpeed creates a new group for each default process group",
)
SECONDARY_GROUP = Patch(
    target="deepspeed.utils.groups:_ZERO_PARAM_INTRA_PARALLEL_GROUP",
    replacement=lambda group: None,
    why="the group of a ZeRO++ secondary partition may be made once only, and outlives the strategy's process groups",
    upstream=f"{_SOURCE}/deepspeed/utils/groups.py#L925-L952",
    versions="0.19.8",
    until="DeepSpeed creates a new group for each default process group",
)
COMM_BACKEND = Patch(
    target="deepspeed.comm.comm:cdb",
    replacement=lambda backend: backend,
    why="init_distributed keeps the first communication backend, which holds the default process group of that moment",
    upstream=f"{_SOURCE}/deepspeed/comm/comm.py#L46",
    versions="0.19.8",
    until="DeepSpeed has a call that frees its communication backend",
)
ACCELERATOR = Patch(
    target="deepspeed.accelerator.real_accelerator:ds_accelerator",
    replacement=lambda accelerator: _if_of_this_device(accelerator),
    why="the device is chosen once for the process; the next strategy may use another",
    upstream=f"{_SOURCE}/accelerator/real_accelerator.py#L51-L54",
    versions="0.19.8",
    until="DeepSpeed follows DS_ACCELERATOR after its first use",
)
MODULE_STACK = Patch(
    target="deepspeed.runtime.zero.parameter_offload:FWD_MODULE_STACK",
    replacement=list,
    why="ZeRO-3 appends each model that it hooks and never removes it, which keeps the model alive",
    upstream=f"{_SOURCE}/deepspeed/runtime/zero/parameter_offload.py#L314-L315",
    versions="0.19.8",
    until="DeepSpeedEngine.destroy removes the model",
)
LINEAR = Patch(
    target="torch.nn.functional:linear",
    replacement=lambda linear: linear,
    why="zero.Init replaces torch's linear for the process by one that frees gathered weights between forward and backward",
    upstream=f"{_SOURCE}/deepspeed/runtime/zero/partition_parameters.py#L412-L419",
    versions="0.19.8",
    until="DeepSpeed restores it when it frees an engine",
)


def _without_default_group(function: Callable[..., Any]) -> Callable[..., Any]:
    """Change the default value in place: a copy of the function would leave it, and with it the group, alive."""
    plain: Any = inspect.unwrap(function)
    values = plain.__defaults__ or ()
    plain.__defaults__ = tuple(None if isinstance(value, dist.ProcessGroup) else value for value in values)
    return function


def _default_group_of(method: str, lines: str) -> Patch:
    return Patch(
        target=f"deepspeed.comm.torch:TorchBackend.{method}",
        parameters=("group",),
        replacement=_without_default_group,
        why="the default value of the argument is the group that existed when DeepSpeed was imported: its socket would stay "
        "open, and a later strategy could not use it. None, the value if DeepSpeed is imported before a process group "
        "exists, means the current group. Undoing the patch leaves None",
        upstream=f"{_SOURCE}/deepspeed/comm/torch.py#{lines}",
        versions="0.19.8",
        until="the default value is None",
    )


BARRIER = _default_group_of("barrier", "L516")
MONITORED_BARRIER = _default_group_of("monitored_barrier", "L522")

PROCESS = (
    WORLD_GROUP,
    SECONDARY_GROUP,
    COMM_BACKEND,
    ACCELERATOR,
    MODULE_STACK,
    LINEAR,
    BARRIER,
    MONITORED_BARRIER,
)
"""Patches that last as long as a backend."""

# Patches for one call, or of one object

SHARED_MEMORY_OPERATOR = Patch(
    target="deepspeed.comm.torch:build_shm_op",
    replacement=lambda build: lambda: None,
    why="on the CPU the communication backend compiles a shared-memory operator at first use (30 s, with g++ and ninja), "
    "which serves DeepSpeed's inference engine; nothing in training calls it",
    upstream=f"{_SOURCE}/deepspeed/comm/torch.py#L207",
    versions="0.19.8",
    until="the operator is compiled when inference_all_reduce first needs it",
)


def _by_new_name(attribute: str, name: str) -> Patch:
    return Patch(
        target=f"deepspeed.comm.torch:TorchBackend.{attribute}",
        replacement=lambda function: getattr(dist, name, function),
        why=f"DeepSpeed calls torch.distributed.{name} by the name that torch 2.13 deprecates, with a warning each time",
        upstream="https://github.com/pytorch/pytorch/pull/186124",
        versions="0.19.8",
        until=f"DeepSpeed looks for torch.distributed.{name}",
    )


ALL_GATHER = _by_new_name("all_gather_function", "all_gather_single")
REDUCE_SCATTER = _by_new_name("reduce_scatter_function", "reduce_scatter_single")


def _norm_that_overflows_in_fp32(norm_of: Callable[..., torch.Tensor], *args: object, **kwargs: object) -> torch.Tensor:
    norm = norm_of(*args, **kwargs)
    return torch.where(norm.square().float().isinf(), -1.0, norm)  # -1: DeepSpeed's sign for "not finite"


GRADIENT_NORM = Patch(
    target="deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3.get_grad_norm_direct",
    parameters=("gradients", "params"),
    replacement=around(_norm_that_overflows_in_fp32),
    why="stage 3 alone keeps its norm in fp64, so that a gradient whose squared norm exceeds fp32 counts as finite; Adam's "
    "second moment, in fp32, would become infinite permanently",
    upstream=f"{_SOURCE}/deepspeed/runtime/zero/stage3.py#L2419",
    versions="0.19.8",
    until="all stages compute the norm in the same type",
)


NO_NORM = Patch(
    target="deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer.scaled_global_norm",
    replacement=lambda norm_of: lambda *args, **kwargs: torch.tensor(-1.0),
    why="a gradient can be discarded only by a step that finds a norm that is not finite, for which -1 stands",
    upstream=f"{_SOURCE}/deepspeed/runtime/zero/stage_1_and_2.py#L3033-L3068",
    versions="0.19.8",
    until="DeepSpeed has a call that discards the accumulated gradient at every stage",
)
NO_NORM_AT_STAGE_3 = Patch(
    target="deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3._get_norm_groups",
    replacement=lambda norms_of: lambda: [torch.tensor(-1.0)],
    why=NO_NORM.why,
    upstream=f"{_SOURCE}/deepspeed/runtime/zero/stage3.py#L2886-L2894",
    versions="0.19.8",
    until=NO_NORM.until,
)


def without_norm(optimizer: object) -> Patch:
    """Return the patch with which a step of ``optimizer`` discards the gradient."""
    return NO_NORM if hasattr(optimizer, NO_NORM.name) else NO_NORM_AT_STAGE_3


def before_reduction(check: Callable[[], None]) -> Patch:
    """Return the patch that calls ``check`` in each backward pass, when all gradients are there."""

    def check_first(epilogue: Callable[[], None]) -> None:
        check()
        epilogue()

    return Patch(
        target="deepspeed.runtime.engine:DeepSpeedEngine._backward_epilogue",
        replacement=around(check_first),
        why="ZeRO-2 adds gradients of different parameters if ranks use different modules; at the epilogue all gradients "
        "are there and, except for full buckets, none is reduced",
        upstream="https://github.com/deepspeedai/DeepSpeed/issues/2343",
        versions="0.19.8",
        until="ZeRO-2 raises an error if the ranks' gradients arrive in different orders",
    )


@functools.cache
def _cached(function: Callable[[], Any]) -> Callable[[], Any]:
    return functools.cache(function)


CPU_INFO = Patch(
    target="cpuinfo:get_cpu_info",
    replacement=_cached,
    why="each DeepSpeedCPUAdam asks py-cpuinfo for the processor's vendor, which takes over a second in a new Python process",
    upstream=f"{_SOURCE}/deepspeed/ops/adam/cpu_adam.py#L75-L78",
    versions="0.19.8",
    until="DeepSpeed caches the vendor",
)

# Internals of DeepSpeed that we use without replacing them


def _internals(owner: str, *names: str) -> list[Target]:
    return [Target(target=f"{owner}{'.' if ':' in owner else ':'}{name}") for name in names]


USED = [
    *_internals(
        "deepspeed.utils.groups",
        "_clone_world_group", "_create_zero_param_parallel_group", "_get_zero_param_intra_parallel_group",
        "_get_data_parallel_group",
    ),
    Target(target="deepspeed.comm.comm:init_distributed", parameters=("dist_backend",)),
    Target(
        target="deepspeed.runtime.engine:DeepSpeedEngine.backward",
        parameters=("loss", "retain_graph", "scale_wrt_gas"),
    ),
    *_internals(
        "deepspeed.runtime.engine:DeepSpeedEngine",
        "_broadcast_model", "buffered_allreduce_fallback", "get_global_grad_norm", "module_forward_pre_hook",
        "module_forward_post_hook", "destroy",
    ),
    *_internals(
        "deepspeed.runtime.bf16_optimizer:BF16_Optimizer",
        "fp32_groups_gradients_flat", "fp32_groups_has_gradients", "update_lp_params", "clear_backward_seen_flag",
        "set_gradient_accumulation_boundary",
    ),
    *_internals(
        "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer",
        "_hp_mapping", "accumulated_grads_in_cpu", "bit16_groups", "custom_loss_scaler", "gradient_accumulation_dtype",
        "override_loss_scale", "single_partition_of_fp32_groups", "update_lp_params", "use_grad_accum_attribute",
        "clear_backward_seen_flag", "set_gradient_accumulation_boundary",
    ),
    *_internals(
        "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3",
        "_z3_optimizer", "_reassign_or_swap_out_partitioned_parameters", "custom_loss_scaler", "empty_partition_cache",
        "fp32_partitioned_groups_flat", "get_param_id", "grad_partitions_flat_buffer", "grad_position",
        "invalidate_secondary_tensor", "override_loss_scale", "clear_backward_seen_flag",
        "set_gradient_accumulation_boundary",
    ),
    *_internals(
        "deepspeed.runtime.zero.partition_parameters:Init",
        "_convert_to_deepspeed_param", "ds_secondary_tensor", "ds_shape", "ds_tensor",
    ),
    Target(target="deepspeed.runtime.zero.linear:LinearFunctionForZeroStage3"),
    Target(target="deepspeed.runtime.zero.linear:zero3_linear_wrap"),
]  # fmt: skip
USED_BY_ADAM_OFFLOAD = _internals("deepspeed.ops.adam:DeepSpeedCPUAdam", "adam_w_mode", "ds_opt_adam", "opt_id")


PATCHES = [
    *PROCESS,
    SHARED_MEMORY_OPERATOR,
    ALL_GATHER,
    REDUCE_SCATTER,
    GRADIENT_NORM,
    NO_NORM,
    NO_NORM_AT_STAGE_3,
    before_reduction(lambda: None),
]
"""All patches, except those of ``adam_offload``."""


@functools.cache
def require_deepspeed(*, adam_offload: bool) -> None:
    """Check, once in a process, that the installed DeepSpeed has all that we patch and use.

    Args:
        adam_offload: Check also what its CPU Adam needs. That imports cpuinfo, which starts processes.

    Raises:
        StrategyError: Names the version, what it lacks and the remedy.
    """
    targets = [*PATCHES, *USED, *([CPU_INFO, *USED_BY_ADAM_OFFLOAD] if adam_offload else [])]
    require("strategy 'deepspeed'", "deepspeed", _SUPPORTED, targets)


def apply_to_process(undo: ExitStack) -> None:
    """Apply the patches that last as long as a backend; ``undo`` restores what they replaced."""
    for patch in PROCESS:
        restore = patch.apply()
        undo.callback(_restore_linear if patch is LINEAR else lambda restore: restore(), restore)


def _restore_linear(restore: Callable[[], None]) -> None:
    """Restore torch's linear, unless it was replaced again since."""
    if torch.nn.functional.linear is import_module("deepspeed.runtime.zero.linear").zero3_linear_wrap:
        restore()


def _if_of_this_device(accelerator: Any) -> Any:
    """Return None, so that DeepSpeed chooses again, if ``accelerator`` is for another device."""
    return accelerator if accelerator and accelerator.device_name() == os.environ["DS_ACCELERATOR"] else None
