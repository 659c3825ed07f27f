"""What DeepSpeed would do to an optimizer in silence, refused before."""

from torch import nn
from torch.optim import Adagrad, Optimizer

from lightrft.config import StrategyError, UnsupportedOperationError
from lightrft.strategy.training.trained_model import TrainedModel


def check_groups(optimizer: Optimizer) -> None:
    """Raise `StrategyError` for a group that DeepSpeed would drop."""
    for index, group in enumerate(optimizer.param_groups):
        if not any(parameter.requires_grad for parameter in group["params"]):
            raise StrategyError(
                f"prepare: group {index} of {len(optimizer.param_groups)} of the optimizer ({type(optimizer).__name__}) has "
                f"no trainable parameters; DeepSpeed would drop it and renumber the others under the scheduler. Make the "
                f"optimizer without this group"
            )


def check_can_be_partitioned(optimizer: Optimizer) -> None:
    """Raise `StrategyError` for an optimizer that would not survive that its parameters become flat partitions."""
    kind = type(optimizer).__name__
    if isinstance(optimizer, Adagrad):
        raise StrategyError(
            f"prepare: DeepSpeed replaces {kind} by one of its own (0.19.8), which neither the scheduler nor param_groups "
            f"would reach; use another optimizer, AdamW for example, or zero_stage=0"
        )
    if optimizer.state:
        raise StrategyError(
            f"prepare: the optimizer ({kind}) has stepped already, and DeepSpeed would drop its state; prepare before the "
            f"first step, and load a checkpoint afterwards"
        )


def check_nothing_is_empty(module: nn.Module) -> None:
    """Raise `UnsupportedOperationError` for parameters without elements, which ZeRO-3 gathers and waits for in vain."""
    empty = [name for name, parameter in module.named_parameters() if parameter.numel() == 0]
    if empty:
        raise UnsupportedOperationError(
            f"prepare: {', '.join(empty[:3])} of {type(module).__name__} have no elements, which ZeRO-3 cannot gather; leave "
            f"them out of the model, or use zero_stage=2 or less"
        )


def check_still_trained(trained: TrainedModel) -> None:
    """Raise `StrategyError` where a parameter was frozen since ZeRO put it into a partition, where it would go on moving."""
    frozen = sum(not parameter.requires_grad for parameter in trained.parameters)
    if frozen:
        raise StrategyError(
            f"optimizer_step: {frozen} parameters of {trained.kind} were frozen after it was prepared, and ZeRO would go on "
            f"updating them; freeze them before, or use zero_stage=0"
        )
