"""What the ZeRO stages have in common: the seam between the strategy's hooks and one stage's way of doing them."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from lightrft.config import StrategyConfig
from lightrft.deepspeed.checks import check_can_be_partitioned, check_groups
from lightrft.deepspeed.ds_config import computes_in_bf16, fit_bucket
from lightrft.deepspeed.engine import Engine
from lightrft.deepspeed.inputs import cast_inputs
from lightrft.deepspeed.parking import Parking
from lightrft.deepspeed.removal import strip
from lightrft.strategy.backend import WrapOptions, cast
from lightrft.strategy.distributed.world import World
from lightrft.strategy.shards import Shard, StateSlice
from lightrft.strategy.training.modules import replicate, tensors_of
from lightrft.strategy.training.trained_model import TrainedModel


@dataclass(frozen=True, kw_only=True)
class Configs:
    """DeepSpeed's configurations, asked for when an engine is made."""

    train: Callable[[], dict[str, Any]]
    eval: Callable[[], dict[str, Any]]


class Stage(ABC):
    """One ZeRO stage, with the models that it has made ready.

    The defaults are those of a model that is whole on every rank, and whose optimizer DeepSpeed took over.
    Models are the callers' own, unwrapped: DeepSpeed hangs on their parameters, and replaces none of them.
    """

    def __init__(self, config: StrategyConfig, world: World, configs: Configs) -> None:
        self.config, self.world, self._configs = config, world, configs
        self.engines: dict[nn.Module, Engine] = {}
        self._in_bf16: dict[nn.Module, RemovableHandle] = {}
        self._parked: dict[nn.Module, Parking] = {}

    @property
    def capabilities(self) -> frozenset[str]:
        """See `Backend.capabilities`."""
        return frozenset()

    # Preparing

    def wrap(self, module: nn.Module, options: WrapOptions) -> None:
        """Put ``module`` on the device, with rank 0's weights."""
        replicate(module, self.world)

    def bind(self, trained: TrainedModel) -> None:
        """Make the engine that trains the model. Its optimizer holds flat partitions from now on."""
        check_groups(trained.optimizer)
        if self.config.zero_stage > 0:
            check_can_be_partitioned(trained.optimizer)
        self.engines[trained.model] = self._make_engine(trained)
        if computes_in_bf16(self.config):
            self._in_bf16[trained.model] = cast_inputs(trained.model, torch.bfloat16)

    def _make_engine(self, trained: TrainedModel) -> Engine:
        elements = sum(self.full_shape(parameter).numel() for parameter in trained.parameters)
        return Engine(trained.model, fit_bucket(self._configs.train(), elements), trained.optimizer)

    def forward_context(self, module: nn.Module) -> AbstractContextManager[object]:
        """Autocast where bfloat16 is asked for, and DeepSpeed does not store the parameters in it."""
        if self.config.bf16 and module not in self._in_bf16:
            return torch.autocast(self.world.device.type, torch.bfloat16)
        return nullcontext()

    # A step

    def backward(self, trained: TrainedModel, loss: torch.Tensor, retain_graph: bool) -> None:
        """Add the gradient of ``loss``."""
        self.engines[trained.model].add_gradient(loss, retain_graph)

    def update(self, trained: TrainedModel, factor: float) -> float | None:
        """Make the update, and return the norm; or None, where the gradients are reduced and the rest is to do."""
        return self.engines[trained.model].update(factor)

    # Parameters, at rest and whole

    def settle(self, module: nn.Module) -> None:
        """See `Backend._settle`."""

    @contextmanager
    def gathered(self, tensors: Sequence[torch.Tensor], dtype: torch.dtype | None) -> Iterator[Sequence[torch.Tensor]]:
        """See `Backend._gathered`; in fp32 the masters, where there are any."""
        yield [cast(tensor, dtype) for tensor in tensors]

    def full_shape(self, tensor: torch.Tensor) -> torch.Size:
        """See `Backend._full_shape`."""
        return tensor.shape

    @abstractmethod
    def shards(self, module: nn.Module) -> list[Shard]:
        """See `Backend._shards`. After writing to them: `refresh`."""

    def state_slices(self, trained: TrainedModel) -> list[StateSlice] | None:
        """See `Backend._state_slices`; None where the optimizer knows the parameters themselves."""
        return None

    def refresh(self, module: nn.Module) -> None:
        """Make the parameters what the masters are. Every rank calls it."""

    # Memory

    def park(self, module: nn.Module) -> None:
        """Give the memory of ``module`` on the device back: parameters, buffers, gradients, masters."""
        device = self.world.device.type
        self._parked[module] = Parking(tensor for tensor in self._held(module) if tensor.device.type == device)

    def unpark(self, module: nn.Module) -> None:
        """Undo `park`."""
        parked = self._parked.pop(module, None)
        if parked is not None:
            parked.come_back()

    def _held(self, module: nn.Module) -> Iterator[torch.Tensor]:
        for _, tensor in tensors_of(module):
            yield tensor.data
            if tensor.grad is not None:
                yield tensor.grad
        if module in self.engines:
            yield from self.engines[module].tensors()

    # The end

    def close(self) -> None:
        """Take DeepSpeed off all models."""
        for module, engine in self.engines.items():
            engine.remove()
            strip(module)
        for handle in self._in_bf16.values():
            handle.remove()
        self.engines.clear()
        self._in_bf16.clear()
        self._parked.clear()
