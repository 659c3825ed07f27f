"""Functions at LightRFT's module paths that have no other place here; the modules at those paths are aliases.

LightRFT's attention modules ask for the sequence-parallel group, which LightRFT keeps in a global variable. Here, it comes from
the open strategy. Strategy classes are looked up in the registry on first access, so importing an alias imports no backend.
"""

from collections.abc import Callable, Sequence
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist

from lightrft.config import ArgumentError, UnsupportedOperationError
from lightrft.strategy.distributed.world import all_gather_objects
from lightrft.strategy.parallel.exchange import all_to_all
from lightrft.strategy.strategy import strategy_class
from lightrft.strategy.strategy_base import StrategyBase, open_strategies

Item = TypeVar("Item")
Dimensions = int | Sequence[int]


def strategy_alias(class_name: str, registered_name: str) -> Callable[[str], type[StrategyBase]]:
    """Return a module's `__getattr__`, which finds the strategy ``registered_name`` under LightRFT's name of its class."""

    def find(attribute: str) -> type[StrategyBase]:
        if attribute != class_name:
            raise AttributeError(f"expected {class_name}, got {attribute!r}. This module has no other attribute")
        return strategy_class(registered_name)

    return find


# Sequence parallelism


def get_sequence_parallel_group() -> dist.ProcessGroup | None:
    """Return the ranks that share a sequence with this one, or None if no open strategy splits sequences."""
    for strategy in open_strategies():
        if strategy.sequence_parallel.group is not None:
            return strategy.sequence_parallel.group
    return None


def get_sequence_parallel_world_size() -> int:
    """Return the number of ranks that share a sequence with this one; 1 without sequence parallelism."""
    return _size(get_sequence_parallel_group())


class _SeqAllToAll:
    """Exchanges dimensions between the ranks of a group (Ulysses, https://arxiv.org/abs/2309.14509)."""

    @staticmethod
    def apply(
        group: dist.ProcessGroup | None, scatter_idx: Dimensions, gather_idx: Dimensions, *tensors: torch.Tensor
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Split each tensor along ``scatter_idx`` over the ranks, and join what they send along ``gather_idx``.

        The backward pass is the reverse exchange. Without a group, the identity. All ranks of the group must call this.

        Returns:
            A tensor for one tensor, else a tuple.
        """
        pairs = zip(_each(scatter_idx, tensors), _each(gather_idx, tensors), tensors, strict=True)
        outputs = tuple(_exchange(group, scatter, gather, tensor) for scatter, gather, tensor in pairs)
        return outputs[0] if len(outputs) == 1 else outputs


def _each(dimensions: Dimensions, tensors: Sequence[torch.Tensor]) -> Sequence[int]:
    return [dimensions] * len(tensors) if isinstance(dimensions, int) else dimensions


def _exchange(group: dist.ProcessGroup | None, scatter: int, gather: int, tensor: torch.Tensor) -> torch.Tensor:
    size = _size(group)
    if group is None or size == 1:
        return tensor
    if tensor.size(scatter) % size:
        raise ArgumentError(
            f"_SeqAllToAll: expected dimension {scatter} to be a multiple of the group's {size} ranks, got a tensor of shape "
            f"{tuple(tensor.shape)}. Pad it first"
        )
    scatter, gather = scatter % tensor.ndim, gather % tensor.ndim  # LightRFT's takes negative ones too
    return all_to_all([tensor], scatter=scatter, gather=gather, group=group)[0]


# Engines


def gather_inputs_object_for_inference(input_data: list[Item], group: dist.ProcessGroup | None) -> list[Item]:
    """Return the inputs of all ranks that share an engine, in rank order.

    All ranks of ``group`` must call this.

    Args:
        input_data: This rank's inputs, of any class that pickles.
        group: The ranks, such as ``strategy.engine_mp_group``. None: this rank alone.
    """
    if _size(group) == 1:
        return input_data
    return [item for items in all_gather_objects(input_data, group) for item in items]


def get_sglang_engine(model_name_or_path: str, *arguments: object, **settings: object) -> NoReturn:
    """Refuse: LightRFT's engine for reward models has no equivalent here.

    Raises:
        UnsupportedOperationError: Always, with what to use instead.
    """
    raise UnsupportedOperationError(
        f"get_sglang_engine: expected a model in training, got {model_name_or_path!r}: engines here generate only for a "
        f"model in training. Load a reward model with transformers (use_engine=False), or build sglang.Engine yourself"
    )


def _size(group: dist.ProcessGroup | None) -> int:
    return 1 if group is None else dist.get_world_size(group)
