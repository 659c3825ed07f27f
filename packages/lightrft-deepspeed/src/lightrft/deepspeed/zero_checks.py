"""What DeepSpeed would do silently to a model or an optimizer, refused beforehand."""

from torch import nn
from torch.optim import Adagrad, Optimizer

from lightrft.config import StrategyError, UnsupportedOperationError
from lightrft.strategy.backend import TrainedModel


def check_groups(optimizer: Optimizer) -> None:
    """Raise `StrategyError` for a parameter group that DeepSpeed would drop."""
    for index, group in enumerate(optimizer.param_groups):
        if not any(parameter.requires_grad for parameter in group["params"]):
            raise StrategyError(
                f"prepare: expected trainable parameters in every group of the optimizer ({type(optimizer).__name__}), got "
                f"none in group {index} of {len(optimizer.param_groups)}. DeepSpeed would drop it, and the scheduler would "
                f"drive the wrong groups. Create the optimizer without this group"
            )


def check_can_be_partitioned(optimizer: Optimizer) -> None:
    """Raise `StrategyError` for an optimizer that does not survive the partitioning of its parameters."""
    name = type(optimizer).__name__
    if isinstance(
        optimizer, Adagrad
    ):  # https://github.com/deepspeedai/DeepSpeed/blob/v0.19.8/deepspeed/runtime/zero/stage_1_and_2.py#L947
        raise StrategyError(
            f"prepare: expected an optimizer that DeepSpeed keeps, got {name}. DeepSpeed replaces it by one of its own, which "
            f"neither the scheduler nor param_groups reach. Use another optimizer, for example AdamW, or zero_stage=0"
        )
    if optimizer.state:
        raise StrategyError(
            f"prepare: expected an optimizer ({name}) without state, got one that has stepped. DeepSpeed would drop its "
            f"state. Prepare it before the first step, and load a checkpoint afterwards"
        )


def check_nothing_is_empty(module: nn.Module) -> None:
    """Raise `UnsupportedOperationError` for parameters without elements: ZeRO-3 hangs when it gathers them."""
    empty = [name for name, parameter in module.named_parameters() if parameter.numel() == 0]
    if empty:
        raise UnsupportedOperationError(
            f"prepare: expected parameters with elements, got none in {', '.join(empty[:3])} of {type(module).__name__}, "
            f"which ZeRO-3 cannot gather. Leave them out of the model, or use zero_stage=2"
        )


def check_still_trained(trained: TrainedModel) -> None:
    """Raise `StrategyError` for parameters that were frozen since they were partitioned: ZeRO would go on updating them."""
    frozen = sum(not parameter.requires_grad for parameter in trained.parameters)
    if frozen:
        raise StrategyError(
            f"optimizer_step: expected the parameters of {trained.class_name} that were trainable when it was prepared to be "
            f"trainable still, got {frozen} that are frozen. ZeRO would go on updating them. Freeze them before preparing, or "
            f"use zero_stage=0"
        )
