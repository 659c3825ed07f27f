"""Strategies with hooks for saboteurs: each hook changes one part of a call, so that a saboteur shows only its defect.

Those that derive from `StrategyBase` come before the strategy among the base classes: ``class Saboteur(CheckpointHooks,
FakeStrategy)``.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from lightrft.strategy import FakeStrategy, StepResult, StrategyBase
from lightrft.strategy.checkpoint.checkpoint_items import Models
from lightrft.strategy.data.loaders import ResumableLoader
from lightrft.strategy.distributed.collectives import ReduceOp
from lightrft.strategy.models.weight_stream import Bucket

# Some overridden methods are final: a type checker would find these saboteurs.
# mypy: disable-error-code="misc"

Device = torch.device | str | None
Options = dict[str, Any]
"""Keyword arguments of a call, by name."""
Loaded = tuple[Path, Any]
"""What load_ckpt returns: the path and the client state."""


class StepHooks(FakeStrategy):
    """Hooks before and after optimizer_step."""

    def optimizer_step(
        self, optimizer: Optimizer, model: nn.Module, scheduler: LRScheduler | None = None, name: str = "model", *,
        boundary: bool | None = None,
    ) -> StepResult:  # fmt: skip
        result = super().optimizer_step(optimizer, model, scheduler, name, boundary=self.boundary(boundary))
        self.stepped(result, scheduler)
        return self.reported(result)

    def boundary(self, given: bool | None) -> bool | None:
        """Return the ``boundary`` to step with."""
        return given

    def stepped(self, result: StepResult, scheduler: LRScheduler | None) -> None:
        """Act after a step."""

    def reported(self, result: StepResult) -> StepResult:
        """Return what optimizer_step returns."""
        return result


class CollectiveHooks(StrategyBase):
    """Hooks after all_reduce and all_gather."""

    def all_reduce(self, data: Any, op: ReduceOp = "mean") -> Any:
        return self.reduced(data, super().all_reduce(data, op))

    def all_gather(self, data: Any) -> Any:
        return self.gathered(data, super().all_gather(data))

    def reduced(self, data: object, result: object) -> object:
        """Return what all_reduce of ``data`` returns."""
        return result

    def gathered(self, data: object, result: object) -> object:
        """Return what all_gather of ``data`` returns."""
        return result


class LoaderHooks(StrategyBase):
    """A hook after setup_dataloader."""

    def setup_dataloader(self, *arguments: Any, **more: Any) -> DataLoader[Any]:
        loader = super().setup_dataloader(*arguments, **more)
        assert isinstance(loader, ResumableLoader)
        self.loader_made(loader)
        return loader

    def loader_made(self, loader: ResumableLoader) -> None:
        """Change a new loader."""


class CheckpointHooks(StrategyBase):
    """save_ckpt and load_ckpt with all but the first three arguments in a dict, and a hook after loading."""

    def save_ckpt(self, model: Models, save_dir: Any, tag: str | None = None, *rest: Any, **options: Any) -> Path:
        assert not rest, "the suite passes the other arguments by name"
        return self.save(model, Path(save_dir), tag, options)

    def load_ckpt(self, model: Models, load_dir: Any, tag: str | None = None, *rest: Any, **options: Any) -> Loaded:
        assert not rest, "the suite passes the other arguments by name"
        path, state = self.load(model, Path(load_dir), tag, options)
        self.loaded(model, options)
        return path, state

    def save(self, model: Models, directory: Path, tag: str | None, options: Options) -> Path:
        """Call save_ckpt."""
        return super().save_ckpt(model, directory, tag, **options)

    def load(self, model: Models, directory: Path, tag: str | None, options: Options) -> Loaded:
        """Call load_ckpt."""
        return super().load_ckpt(model, directory, tag, **options)

    def loaded(self, model: Models, options: Options) -> None:
        """Act after loading."""


class StreamHooks(FakeStrategy):
    """A hook for each bucket of full_parameters."""

    def full_parameters(self, *arguments: Any, **more: Any) -> Iterator[Bucket]:
        return map(self.bucket, super().full_parameters(*arguments, **more))

    def bucket(self, bucket: Bucket) -> Bucket:
        """Return the bucket to yield."""
        return bucket


class GenerationHooks(StrategyBase):
    """A hook for the arguments of gather_and_generate."""

    def gather_and_generate(self, sampling_params: object, *rest: object, **arguments: object) -> Any:
        assert not rest, "the suite passes the other arguments by name"
        return super().gather_and_generate(sampling_params, **self.changed(arguments))

    def changed(self, arguments: Options) -> Options:
        """Return the arguments to generate with."""
        return arguments
