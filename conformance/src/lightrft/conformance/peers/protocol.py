"""The interface through which a training library is judged: the loop of its documentation, in parts.

An adapter implements `TrainingLoop` with the library's own means and works around nothing. What the library leaves to
the script, the adapter does as the library's documentation shows; where neither is possible, it raises `NotOffered`.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import Dataset

ReduceOp = Literal["mean", "sum", "max"]
"""How `TrainingLoop.all_reduce` combines the values of the ranks."""


class NotOffered(NotImplementedError):
    """The library does not offer this.

    Args:
        what: What it leaves to the script, in a few words.
        link: The page of its documentation that says so, or that lists what it offers instead.
    """

    def __init__(self, what: str, link: str) -> None:
        super().__init__(what, link)
        self.what, self.link = what, link

    def __str__(self) -> str:
        return f"{self.what}: {self.link}"


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """What a script decides before it trains."""

    accumulation_steps: int = 1
    """K, the number of micro-batches in an update."""
    max_norm: float | None = None
    """The gradient is clipped to this norm; None: not at all."""
    timeout_seconds: float | None = None
    """How long a rank waits for the others; None: the library's default."""
    unused_parameters: bool = False
    """Whether some parameters get no gradient in some updates, for libraries that must know in advance."""
    random_streams: bool = False
    """Whether the program needs checkpoints with the state of the random generators of PyTorch, NumPy and Python; `save` of a
    library that leaves these to the script raises `NotOffered`."""


@dataclass(frozen=True, kw_only=True)
class Update:
    """An update that was made."""

    norm: float | None = None
    """The global norm of the gradient before clipping, if the library reports one."""


class TrainingLoop(Protocol):
    """A training loop of a library, on one rank, from its start to `close`.

    A target, ``module:attribute``, is a callable that takes `LoopSettings` and returns one of these. The process has the
    environment that torchrun gives it, and uses the CPU with gloo. Every rank calls every method, in the same order, unless a
    program tests what happens otherwise. A program does this::

        loop = target(LoopSettings(accumulation_steps=2, max_norm=1.0))
        model = loop.prepare(model, make_optimizer)
        for batch in loop.batches(dataset, batch_size=4):
            with loop.micro_batch(model):
                loop.backward(loss_of(model, batch), model)
                update = loop.step(model)  # None until the K-th micro-batch
        loop.close()
    """

    def prepare(
        self,
        model: nn.Module,
        make_optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        make_scheduler: Callable[[Optimizer], LRScheduler] | None = None,
    ) -> nn.Module:
        """Prepare a model for training. May be called for several models.

        Args:
            model: The model, built in the same way on all ranks, unless a program tests otherwise.
            make_optimizer: Makes the optimizer from parameters, before or after the model is wrapped.
            make_scheduler: Makes a scheduler that steps once per update.

        Returns:
            What the program calls, and passes to the other methods.
        """
        ...

    def batches(
        self,
        dataset: Dataset[torch.Tensor],
        *,
        batch_size: int,
        shuffle: bool = False,
        epoch: int = 0,
        consumed: int = 0,
    ) -> Iterable[torch.Tensor]:
        """This rank's batches of one epoch.

        Args:
            dataset: Items of equal shape, as in `torch.utils.data.TensorDataset`, but tensors instead of tuples.
            batch_size: Items in a batch of one rank.
            shuffle: Whether the order is random; it depends on the epoch and on a fixed seed.
            epoch: The number of the epoch.
            consumed: Batches of this rank to leave out, because they were trained on before an interruption.
        """
        ...

    def micro_batch(self, model: nn.Module, *, last: bool = False) -> AbstractContextManager[object]:
        """The context of one micro-batch: forward, backward and `step`.

        Args:
            model: What `prepare` returned.
            last: Whether the data ends with this micro-batch, and the update with it, even if it has fewer than K.
                Libraries that see the end of their loaders themselves need not read it.
        """
        ...

    def backward(self, loss: torch.Tensor, model: nn.Module, *, retain_graph: bool = False) -> None:
        """Add the gradient of ``loss`` to the update in progress. May be called several times in a micro-batch.

        Args:
            loss: The mean over this rank's micro-batch, not divided by K.
            model: What `prepare` returned.
            retain_graph: As in `torch.Tensor.backward`.
        """
        ...

    def step(self, model: nn.Module) -> Update | None:
        """End a micro-batch; after the K-th, clip, step the optimizer and the scheduler, and clear the gradient.

        Returns:
            The update that was made; None before the K-th micro-batch.
        """
        ...

    def weights(self, model: nn.Module) -> Mapping[str, torch.Tensor]:
        """The full weights that this rank trains, under the names of the model that was passed to `prepare`."""
        ...

    def learning_rate(self, model: nn.Module) -> float:
        """The current learning rate of the optimizer's first group."""
        ...

    def all_reduce(self, value: Any, op: ReduceOp) -> Any:
        """Combine a tensor, a number or a dict of them over the ranks."""
        ...

    def all_gather(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows (dim 0) of all ranks, in rank order. Ranks may have different numbers of rows."""
        ...

    def save(self, folder: Path, model: nn.Module, progress: Mapping[str, int]) -> None:
        """Save what a run needs to continue: weights, optimizer, scheduler and ``progress``; also the state of the random
        generators, see `LoopSettings.random_streams`.

        Args:
            folder: Where the checkpoint goes, on all ranks. It may hold an older checkpoint, which the new one replaces.
            model: What `prepare` returned.
            progress: Numbers of the script, such as the epoch.
        """
        ...

    def load(self, folder: Path, model: nn.Module) -> Mapping[str, int]:
        """Continue from what `save` wrote to ``folder``.

        Returns:
            The progress that was saved.
        """
        ...

    def close(self) -> None:
        """End the run, and leave the process group."""
        ...


Target = Callable[[LoopSettings], TrainingLoop]
"""What is judged."""
