"""Defects of one corner of data, checkpoints and export."""

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from typing_extensions import override

from lightrft.conformance.saboteurs.catalogue import saboteur
from lightrft.conformance.saboteurs.checkpoints import Saves
from lightrft.conformance.saboteurs.data import Odd
from lightrft.strategy import FakeStrategy
from lightrft.strategy.checkpoint.loading import Loading
from lightrft.strategy.checkpoint.store import Store
from lightrft.strategy.training.data import ElasticSampler
from lightrft.strategy.training.trained_model import TrainedModel

# mypy: disable-error-code="misc, method-assign"


class TwoOrders(ElasticSampler):
    """Epochs from the second on are alike."""

    @override
    def order(self) -> list[int]:
        epoch, self.epoch = self.epoch, min(self.epoch, 1)
        try:
            return super().order()
        finally:
            self.epoch = epoch


@saboteur("DATA-3")
class LaterEpochsAlike(Odd):
    """Epochs from the second on have one order."""

    sampler = TwoOrders


@saboteur("DATA-2")
class PassesOverAlways(FakeStrategy):
    """What consumed_samples passes over is passed over in every epoch."""

    def setup_dataloader(self, *arguments: Any, consumed_samples: int = 0, **more: Any) -> Any:
        loader: Any = super().setup_dataloader(*arguments, consumed_samples=consumed_samples, **more)
        own = loader.set_epoch
        loader.set_epoch = lambda epoch, consumed=None: own(epoch, consumed or consumed_samples or None)
        return loader


@saboteur("CKPT-1")
class FirstLoaderOnly(Saves):
    """Loading sets the position of the first loader alone."""

    def setup_dataloader(self, *arguments: Any, **more: Any) -> Any:
        loader: Any = super().setup_dataloader(*arguments, **more)
        if len(self._checkpoints.loaders._living) > 1:
            loader.load_state_dict = lambda state: None
        return loader


@saboteur("CKPT-1")
class ForgetsHalfAPair(Saves):
    """Normal numbers come in pairs; loading loses the second of one, in Python's stream."""

    def load_ckpt(self, *arguments: Any, **more: Any) -> Any:
        result = super().load_ckpt(*arguments, **more)
        version, numbers, _ = random.getstate()
        random.setstate((version, numbers, None))
        return result


@saboteur("CKPT-1")
class ForgetsHalfAPairOfNumPy(Saves):
    """Normal numbers come in pairs; loading loses the second of one, in NumPy's stream."""

    def load_ckpt(self, *arguments: Any, **more: Any) -> Any:
        result = super().load_ckpt(*arguments, **more)
        state: Any = np.random.get_state(legacy=True)
        np.random.set_state((*state[:3], 0, 0.0))
        return result


@saboteur("CKPT-1")
class KeepsMomentum(Saves):
    """Loading what was saved before the first update leaves the optimizer's state."""

    def load_ckpt(self, model: Any, *arguments: Any, **more: Any) -> Any:
        trained = self.trained_of(model)
        before = {} if trained is None else dict(trained.optimizer.state)
        result = super().load_ckpt(model, *arguments, **more)
        if trained is not None and not trained.optimizer.state:
            trained.optimizer.state.update(before)
        return result


@contextmanager
def settled(trained: TrainedModel | None) -> Iterator[None]:
    """Pretend that no gradient is pending."""
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
    """Of several models, only the first is asked whether a gradient is pending."""

    def save_ckpt(self, model: Any, *arguments: Any, **more: Any) -> Any:
        second = list(model.values())[1] if isinstance(model, Mapping) and len(model) > 1 else None
        found = None if second is None else self._models.find(second)
        with settled(None if found is None else found.trained):
            return super().save_ckpt(model, *arguments, **more)


@saboteur("CKPT-2")
class KeepsTheOld(Saves):
    """Saving under a tag that is there does nothing."""

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
    """Without a tag, load takes the last by name."""

    def load_ckpt(self, model: Any, load_dir: Any, tag: Any = None, *arguments: Any, **more: Any) -> Any:
        tags = sorted(it.tag for it in Store(Path(load_dir)).committed())
        return super().load_ckpt(model, load_dir, tags[-1] if tag is None and tags else tag, *arguments, **more)


@saboteur("CKPT-3")
class OneClientState(Saves):
    """What load gives back is the very object that was saved, whatever became of it."""

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
    """Large integers in the client state come back as near as a float is."""

    def load_ckpt(self, *arguments: Any, **more: Any) -> Any:
        path, state = super().load_ckpt(*arguments, **more)
        large = {key for key, value in state.items() if isinstance(value, int) and abs(value) > 2**63}
        return path, {key: int(float(value)) if key in large else value for key, value in state.items()}


@saboteur("CKPT-6")
class OptimizerUnverified(Saves):
    """The optimizer's state is loaded unverified."""

    def load_ckpt(self, *arguments: Any, **more: Any) -> Any:
        own = Loading._is_read
        Loading._is_read = lambda loading, parts, names: "optimizer" not in parts and own(loading, parts, names)  # type: ignore[assignment]
        try:
            return super().load_ckpt(*arguments, **more)
        finally:
            Loading._is_read = own


@saboteur("CKPT-8")
class RatesComeAlong(Saves):
    """load_optimizer_states=False loads the rates all the same."""

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
    """load_module_only sets the number of updates back."""

    def load_ckpt(self, model: Any, *arguments: Any, **more: Any) -> Any:
        result = super().load_ckpt(model, *arguments, **more)
        trained = self.trained_of(model)
        if trained is not None and more.get("load_module_only"):
            trained.updates = 0
        return result


@saboteur("EXPORT-1")
class ExportsHalfByDefault(FakeStrategy):
    """Where no type is asked for, weights are written as fp16."""

    def save_model(self, *arguments: Any, dtype: Any = None, **more: Any) -> Path:
        return super().save_model(*arguments, dtype=dtype or torch.float16, **more)
