"""The types that the hooks of a backend take and return.

A model's state is described by ranges of flattened tensors: FSDP2's dim-0 shards and ZeRO's partitions are both
contiguous ranges, and so is a full tensor. Code that moves state between layouts is written once, for ranges.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightrft.config import LightRFTError


@dataclass(frozen=True, kw_only=True)
class WrapOptions:
    """How to prepare a model."""

    training: bool
    shard_size: int = -1
    """Number of ranks that share one copy of the parameters; the other ranks hold replicas. -1: the setting."""
    reshard_after_forward: bool = True
    """Free gathered parameters after the forward pass and gather them again for the backward pass."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A contiguous range of one flattened tensor, held by this rank."""

    name: str
    shape: torch.Size
    """Shape of the full tensor."""
    offset: int
    """Index of the first element of the range in the flattened full tensor."""
    values: torch.Tensor
    """A view of the model's memory: writing to it changes the model. 1-D, or a full tensor that is not contiguous."""

    @property
    def range(self) -> tuple[str, int, int]:
        """Name, first element and number of elements."""
        return self.name, self.offset, self.values.numel()

    def renamed(self, name: str) -> "Shard":
        """Return the same range under another name."""
        return Shard(name=name, shape=self.shape, offset=self.offset, values=self.values)

    def of(self, full: torch.Tensor) -> torch.Tensor:
        """Return the same range of another full tensor of this shape, shaped like ``values``."""
        return full.reshape(-1)[self.offset : self.offset + self.values.numel()].view(self.values.shape)


@dataclass(frozen=True, kw_only=True)
class StateSlice:
    """The location of an optimizer's state for a range of one parameter."""

    shard: Shard
    key: torch.Tensor
    """The optimizer's own tensor for the range: the parameter, or a flat partition of many parameters."""
    start: int
    """Index of the range's first element in the flattened local part of ``key``, and so in each of its state tensors."""

    @property
    def is_full(self) -> bool:
        """Whether ``key`` is the parameter itself, and this rank holds all of it."""
        return self.shard.values.numel() == self.shard.shape.numel() == self.key.numel()

    def of(self, values: torch.Tensor, name: str) -> Shard:
        """Return this range of a state tensor with local part ``values`` (see `tensors.elements`)."""
        part = values if self.is_full else values[self.start : self.start + self.shard.values.numel()]
        return Shard(name=name, shape=self.shard.shape, offset=self.shard.offset, values=part)


@dataclass(frozen=True, kw_only=True)
class GradientShards:
    """Gradients of which this rank holds a part."""

    tensors: Sequence[torch.Tensor]
    group: dist.ProcessGroup | None = None
    """The ranks that hold the other parts; None if this rank holds every element."""


def parameters_of(optimizer: Optimizer) -> Iterator[nn.Parameter]:
    """Yield every parameter of every group of ``optimizer``."""
    for group in optimizer.param_groups:
        yield from group["params"]


def sizes_of_groups(optimizer: Optimizer) -> list[int]:
    """Return the number of parameters in each group of ``optimizer``."""
    return [len(group["params"]) for group in optimizer.param_groups]


class TrainedModel:
    """A model in training, with its optimizer and the counters of its updates. Models share no state."""

    def __init__(
        self, model: nn.Module, model_class: type[nn.Module], optimizer: Optimizer, accumulation_steps: int
    ) -> None:
        """Start counting.

        Args:
            model: The unwrapped model, after `Backend.wrap`.
            model_class: Its class before wrapping, which may replace it.
            optimizer: The optimizer that holds the model's parameters.
            accumulation_steps: K, the number of micro-batches of one update on one rank.
        """
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        self.model, self.optimizer, self.accumulation_steps = model, optimizer, accumulation_steps
        self.class_name = model_class.__name__
        self.parameters = [parameter for parameter in parameters_of(optimizer) if parameter.requires_grad]
        """The trainable parameters of the optimizer."""
        self.parameter_ids = frozenset(map(id, self.parameters))
        self.frozen = {
            names[id(parameter)]: parameter for parameter in parameters_of(optimizer) if not parameter.requires_grad
        }
        """Parameters of the optimizer that were frozen when the model was prepared, by name."""
        self.group_names = [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]
        """Names of the parameters in each group of the caller's optimizer."""
        self.group_sizes = sizes_of_groups(optimizer)
        """Numbers of parameters in each group of the optimizer as it is stepped, which may hold flat partitions."""
        self.scheduler: LRScheduler | None = None
        self.optimizer_offloaded = False
        self.micro_batches = 0
        """Calls of `optimizer_step` since the last update."""
        self.backward_calls = 0
        """Calls of `backward` since the last update."""
        self.denominators: list[float | torch.Tensor | None] = []
        """The ``denominator`` of each of them; see `lightrft.strategy.step.denominators`."""
        self.losses: list[torch.Tensor] = []
        """The loss of each of them: 0-d, fp64, on its device."""
        self.updates = 0
        """Updates applied."""
        self.skipped = 0
        """Updates skipped."""
        self.skipped_in_a_row = 0
        self.averages: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
        """Updates that each moving average includes. Without an entry: those before this run started or resumed."""
        self._resumed_updates = 0
        self.deferred_error: LightRFTError | None = None
        """An error of this rank alone in the update in progress, which `optimizer_step` raises on all ranks."""
        self.updating = False
        """Whether an update is being made: only then may the optimizer step."""
        self.gradients_seen: list[tuple[torch.Tensor | None, int]] = [(None, 0)] * len(
            self.parameters[:1] + self.parameters[-1:]
        )
        """The gradients of the first and the last parameter, with their versions, as the strategy left them."""

    @property
    def has_pending_gradient(self) -> bool:
        """Whether there are accumulated micro-batches that no update has used yet."""
        return bool(self.micro_batches or self.backward_calls)

    def state_dict(self) -> dict[str, int]:
        """Return the counters that a checkpoint stores."""
        return {"updates": self.updates, "skipped": self.skipped, "skipped_in_a_row": self.skipped_in_a_row}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the counters that `state_dict` returned."""
        self.updates, self.skipped = state["updates"], state["skipped"]
        self.skipped_in_a_row = state["skipped_in_a_row"]
        self._resumed_updates = self.updates
        self.averages.clear()

    def updates_in(self, average: nn.Module) -> int:
        """Return how many of the updates a moving average of this model includes."""
        return self.averages.get(average, self._resumed_updates)
