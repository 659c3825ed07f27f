"""Defects in one edge case of data, checkpoints and export."""

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from typing_extensions import override

from lightrft.conformance.saboteurs.catalogue import saboteur
from lightrft.conformance.saboteurs.checkpoints import Saves
from lightrft.conformance.saboteurs.data import WithSampler
from lightrft.strategy import FakeStrategy
from lightrft.strategy.backend import TrainedModel
from lightrft.strategy.checkpoint.load_checkpoint import CheckpointLoading
from lightrft.strategy.checkpoint.store import Store
from lightrft.strategy.data.loaders import ElasticSampler

# mypy: disable-error-code="misc"


class TwoOrders(ElasticSampler):
    """Epoch 1 and later epochs have one order."""

    @override
    def order(self) -> list[int]:
        epoch, self.epoch = self.epoch, min(self.epoch, 1)
        try:
            return super().order()
        finally:
            self.epoch = epoch


@saboteur("DATA-3")
class LaterEpochsAlike(WithSampler):
    """The second and all later epochs have the same order."""

    sampler = TwoOrders


@saboteur("DATA-2")
class PassesOverAlways(FakeStrategy):
    """consumed_samples is skipped in every epoch, not only in the first."""

    def setup_dataloader(self, *arguments: Any, consumed_samples: int = 0, **more: Any) -> Any:
        loader: Any = super().setup_dataloader(*arguments, consumed_samples=consumed_samples, **more)
        set_epoch = loader.set_epoch
        loader.set_epoch = lambda epoch, consumed=None: set_epoch(epoch, consumed or consumed_samples or None)
        return loader


@saboteur("CKPT-1")
class FirstLoaderOnly(Saves):
    """Loading restores the position of the first loader only."""

    def setup_dataloader(self, *arguments: Any, **more: Any) -> Any:
        loader: Any = super().setup_dataloader(*arguments, **more)
        if len(self.loaders) > 1:
            loader.load_state_dict = lambda state: None
        return loader


@saboteur("CKPT-1")
class ForgetsHalfAPair(Saves):
    """Normal random numbers are drawn in pairs; loading loses the pending one of Python's stream."""

    def load_ckpt(self, *arguments: Any, **more: Any) -> Any:
        result = super().load_ckpt(*arguments, **more)
        version, numbers, _ = random.getstate()
        random.setstate((version, numbers, None))
        return result


@saboteur("CKPT-1")
class ForgetsHalfAPairOfNumPy(Saves):
    """Normal random numbers are drawn in pairs; loading loses the pending one of NumPy's stream."""

    def load_ckpt(self, *arguments: Any, **more: Any) -> Any:
        result = super().load_ckpt(*arguments, **more)
        state: Any = np.random.get_state(legacy=True)
        np.random.set_state((*state[:3], 0, 0.0))
        return result


@saboteur("CKPT-1")
class KeepsMomentum(Saves):
    """Loading a checkpoint from before the first update keeps the optimizer's present state."""

    def load_ckpt(self, model: Any, *arguments: Any, **more: Any) -> Any:
        trained = self.trained_of(model)
        before = {} if trained is None else dict(trained.optimizer.state)
        result = super().load_ckpt(model, *arguments, **more)
        if trained is not None and not trained.optimizer.state:
            trained.optimizer.state.update(before)
        return result


@contextmanager
def without_pending_gradient(trained: TrainedModel | None) -> Iterator[None]:
    """Report in the body that no gradient of ``trained`` is pending."""
    if trained is None:
        yield
        return
    counts = trained.micro_batches, trained.backwards
    trained.micro_batches = trained.backwards = 0
    try:
        yield
    finally:
        trained.micro_batches, trained.backwards = counts


@saboteur("CKPT-1")
class LooksAtTheFirst(Saves):
    """Of several models, only the first is checked for a pending gradient."""

    def save_ckpt(self, model: Any, *arguments: Any, **more: Any) -> Any:
        second = list(model.values())[1] if isinstance(model, Mapping) and len(model) > 1 else None
        prepared = None if second is None else self._models.find(second)
        with without_pending_gradient(None if prepared is None else prepared.trained):
            return super().save_ckpt(model, *arguments, **more)


@saboteur("CKPT-2")
class KeepsTheOld(Saves):
    """Saving under an existing tag does nothing."""

    def save_ckpt(self, model: Any, save_dir: Any, tag: Any = None, *arguments: Any, **more: Any) -> Any:
        if tag is not None and (Path(save_dir) / tag).is_dir():
            return Path(save_dir) / tag
        return super().save_ckpt(model, save_dir, tag, *arguments, **more)


@saboteur("CKPT-2")
class AlwaysLatest(Saves):
    """save_latest is ignored."""

    def save_ckpt(self, *arguments: Any, **more: Any) -> Any:
        return super().save_ckpt(*arguments, **{**more, "save_latest": True})


@saboteur("CKPT-2")
class LastByName(Saves):
    """Without a tag, the last checkpoint by name is loaded."""

    def load_ckpt(self, model: Any, load_dir: Any, tag: Any = None, *arguments: Any, **more: Any) -> Any:
        tags = sorted(checkpoint.tag for checkpoint in Store(Path(load_dir)).committed())
        return super().load_ckpt(model, load_dir, tags[-1] if tag is None and tags else tag, *arguments, **more)


@saboteur("CKPT-3")
class OneClientState(Saves):
    """load_ckpt returns the object that was passed to save_ckpt, with its later changes."""

    def save_ckpt(self, *arguments: Any, **more: Any) -> Any:
        path = super().save_ckpt(*arguments, **more)
        self.__dict__.setdefault("_given", {})[path] = more.get("client_state")
        return path

    def load_ckpt(self, *arguments: Any, **more: Any) -> Any:
        path, state = super().load_ckpt(*arguments, **more)
        given = self.__dict__.get("_given", {}).get(path)
        return path, state if given is None else given


@saboteur("CKPT-3")
class LargeIntsRounded(Saves):
    """Large integers in the client state are rounded to floats."""

    def load_ckpt(self, *arguments: Any, **more: Any) -> Any:
        path, state = super().load_ckpt(*arguments, **more)
        large = {key for key, value in state.items() if isinstance(value, int) and abs(value) > 2**63}
        return path, {key: int(float(value)) if key in large else value for key, value in state.items()}


@saboteur("CKPT-6")
class OptimizerUnverified(Saves):
    """The optimizer's state is not verified before it is loaded."""

    def load_ckpt(self, *arguments: Any, **more: Any) -> Any:
        is_loaded = CheckpointLoading._is_loaded
        without_optimizer = lambda loading, parts, names: "optimizer" not in parts and is_loaded(loading, parts, names)  # noqa: E731
        with patch.object(CheckpointLoading, "_is_loaded", without_optimizer):
            return super().load_ckpt(*arguments, **more)


@saboteur("CKPT-8")
class RatesComeAlong(Saves):
    """load_optimizer_states=False loads the learning rates nevertheless."""

    def load_ckpt(self, model: Any, *arguments: Any, **more: Any) -> Any:
        trained, wanted = self.trained_of(model), more.get("load_optimizer_states", True)
        if wanted or trained is None:
            return super().load_ckpt(model, *arguments, **more)
        states = dict(trained.optimizer.state)
        result = super().load_ckpt(model, *arguments, **{**more, "load_optimizer_states": True})
        trained.optimizer.state.clear()
        trained.optimizer.state.update(states)
        return result


@saboteur("CKPT-8")
class CountsAnew(Saves):
    """load_module_only sets the number of updates to 0."""

    def load_ckpt(self, model: Any, *arguments: Any, **more: Any) -> Any:
        result = super().load_ckpt(model, *arguments, **more)
        trained = self.trained_of(model)
        if trained is not None and more.get("load_module_only"):
            trained.updates = 0
        return result


@saboteur("EXPORT-1")
class ExportsHalfByDefault(FakeStrategy):
    """Without dtype, weights are written as fp16."""

    def save_model(self, *arguments: Any, dtype: Any = None, **more: Any) -> Path:
        return super().save_model(*arguments, dtype=dtype or torch.float16, **more)
