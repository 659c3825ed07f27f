"""What DeepSpeed would do silently to a model or an optimizer, refused beforehand."""

from collections.abc import Callable, Sequence

import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from torch import nn
from torch.optim import Adagrad, Optimizer

from lightrft.config import StrategyError, UnsupportedOperationError
from lightrft.strategy.backend import TrainedModel, World, check_elementwise

_MOST_PARTS = 4
"""Maximum number of parts on which an optimizer is tested; more ranks change nothing."""


def check_groups(optimizer: Optimizer) -> None:
    """Raise `StrategyError` for a parameter group that DeepSpeed would drop."""
    for index, group in enumerate(optimizer.param_groups):
        if not any(parameter.requires_grad for parameter in group["params"]):
            raise StrategyError(
                f"prepare: expected trainable parameters in every group of the optimizer ({type(optimizer).__name__}), got "
                f"none in group {index} of {len(optimizer.param_groups)}. DeepSpeed would drop it, and the scheduler would "
                f"change the wrong groups. Create the optimizer without this group"
            )


def check_can_be_partitioned(optimizer: Optimizer) -> None:
    """Raise `StrategyError` for an optimizer that does not survive the partitioning of its parameters."""
    name = type(optimizer).__name__
    if isinstance(
        optimizer, Adagrad
    ):  # https://github.com/deepspeedai/DeepSpeed/blob/v0.19.8/deepspeed/runtime/zero/stage_1_and_2.py#L947
        raise StrategyError(
            f"prepare: expected an optimizer that DeepSpeed keeps, got {name}. DeepSpeed replaces it by its own, which "
            f"the scheduler and param_groups do not change. Use another optimizer, for example AdamW, or zero_stage=0"
        )
    if optimizer.state:
        raise StrategyError(
            f"prepare: expected an optimizer ({name}) without state, got one that has stepped. DeepSpeed would drop its "
            f"state. Prepare it before the first step, and load a checkpoint afterwards"
        )


def check_on_flat_parts(optimizer: Optimizer, world: World, shape_of: Callable[[torch.Tensor], torch.Size]) -> None:
    """Raise `StrategyError` for an optimizer that needs whole parameters: ZeRO flattens a group and gives each rank a range.

    Not tried: DeepSpeed's own, whose operators a copy would share.
    """
    if isinstance(optimizer, (DeepSpeedCPUAdam, FusedAdam)):
        return
    ranks = min(world.size, _MOST_PARTS)

    def partition(tensors: list[torch.Tensor]) -> list[list[torch.Tensor]]:
        return [[part] for part in torch.cat([tensor.reshape(-1) for tensor in tensors]).chunk(ranks)]

    check_elementwise(
        optimizer,
        partition,
        lambda parameter: len(shape_of(parameter)),
        device=world.device,
        refusal="ZeRO flattens the parameters of a group and steps a range of them on each rank. Use an optimizer that treats "
        "each element independently, for example AdamW, or zero_stage=0, or for Muon strategy 'fsdp'",
    )


def check_nothing_is_empty(module: nn.Module) -> None:
    """Raise `UnsupportedOperationError` for parameters without elements: ZeRO-3 hangs when it gathers them."""
    empty = [name for name, parameter in module.named_parameters() if parameter.numel() == 0]
    if empty:
        raise UnsupportedOperationError(
            f"prepare: expected parameters with elements, got none in {', '.join(empty[:3])} of {type(module).__name__}, "
            f"which ZeRO-3 cannot gather. Leave them out of the model, or use zero_stage=2"
        )


def check_not_written(trained: TrainedModel, written: Sequence[nn.Parameter]) -> None:
    """Raise `StrategyError` for parameters that a script wrote to, which are sharded: the write has no effect."""
    if written:
        raise StrategyError(
            f"optimizer_step: expected the weights of {trained.class_name} to be written by load_model or load_ckpt, got "
            f"{len(written)} parameters that were written to directly since the last update. They are sharded at zero_stage 3, "
            f"so the write has no effect. Use load_model, or deepspeed.zero.GatheredParameters with modifier_rank"
        )


def check_still_trained(trained: TrainedModel) -> None:
    """Raise `StrategyError` for parameters that were frozen since they were partitioned: ZeRO would continue to update them."""
    frozen = sum(not parameter.requires_grad for parameter in trained.parameters)
    if frozen:
        raise StrategyError(
            f"optimizer_step: expected the parameters of {trained.class_name} that were trainable when it was prepared to "
            f"stay trainable, got {frozen} that are frozen. ZeRO would continue to update them. Freeze them before preparing, or "
            f"use zero_stage=0"
        )
