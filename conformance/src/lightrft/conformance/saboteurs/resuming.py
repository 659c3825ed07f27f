"""Defects of resuming: what a checkpoint stores, and what loading restores."""

import random
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from typing_extensions import override

from lightrft.conformance.saboteurs.catalogue import saboteur
from lightrft.conformance.saboteurs.checkpoints import Saves, without_pending_gradient
from lightrft.conformance.saboteurs.hooks import CheckpointHooks, Loaded, LoaderHooks, Options
from lightrft.conformance.saboteurs.plain import PlainStrategy
from lightrft.strategy import FakeStrategy
from lightrft.strategy.checkpoint import store
from lightrft.strategy.checkpoint.background import BackgroundWriter
from lightrft.strategy.checkpoint.checkpoint_items import Models
from lightrft.strategy.data.loaders import ResumableLoader
from lightrft.strategy.storage.safe_json import to_json

# mypy: disable-error-code="misc, union-attr, arg-type"


@saboteur("CKPT-1")
class SkipsInTheNextEpoch(Saves):
    """After loading, the next epoch too begins at the position that was loaded."""

    @override
    def loaded(self, model: Models, options: Options) -> None:
        for loader in self.loaders:
            vars(loader)["set_epoch"] = partial(_set_epoch, loader.set_epoch, loader.consumed_samples)


def _set_epoch(
    set_epoch: Callable[[int, int | None], None], position: int, epoch: int, consumed: int | None = None
) -> None:
    set_epoch(epoch, position if consumed is None else consumed)


@saboteur("CKPT-1")
class FirstLoaderOnly(Saves):
    """Loading restores the position of the first loader only."""

    @override
    def loader_made(self, loader: ResumableLoader) -> None:
        super().loader_made(loader)
        if len(self.loaders) > 1:
            vars(loader)["load_state_dict"] = lambda state: None


@saboteur("CKPT-1")
class ForgetsHalfAPair(Saves):
    """Normal random numbers are drawn in pairs; loading loses the pending one of Python's stream."""

    @override
    def loaded(self, model: Models, options: Options) -> None:
        version, numbers, _ = random.getstate()
        random.setstate((version, numbers, None))


@saboteur("CKPT-1")
class ForgetsHalfAPairOfNumPy(Saves):
    """Normal random numbers are drawn in pairs; loading loses the pending one of NumPy's stream."""

    @override
    def loaded(self, model: Models, options: Options) -> None:
        state = np.random.get_state(legacy=False)
        np.random.set_state({**state, "has_gauss": 0, "gauss": 0.0})


@saboteur("CKPT-1")
class KeepsMomentum(Saves):
    """Loading a checkpoint from before the first update keeps the optimizer's current state."""

    @override
    def load(self, model: Models, directory: Path, tag: str | None, options: Options) -> Loaded:
        trained = self.trained_of(model)
        before = {} if trained is None else dict(trained.optimizer.state)
        result = super().load(model, directory, tag, options)
        if trained is not None and not trained.optimizer.state:
            trained.optimizer.state.update(before)
        return result


@saboteur("CKPT-1")
class LooksAtTheFirst(Saves):
    """Of several models, only the first is checked for a pending gradient."""

    @override
    def save(self, model: Models, directory: Path, tag: str | None, options: Options) -> Path:
        second = list(model.values())[1] if isinstance(model, Mapping) and len(model) > 1 else None
        prepared = None if second is None else self._models.find(second)
        with without_pending_gradient(None if prepared is None else prepared.trained):
            return super().save(model, directory, tag, options)


@saboteur("CKPT-7", world=2)
class PositionOfOneRank(CheckpointHooks, LoaderHooks, PlainStrategy):
    """A checkpoint of another number of ranks restores a position that counts the samples of one rank."""

    @override
    def loader_made(self, loader: ResumableLoader) -> None:
        self.__dict__.setdefault("_made", []).append(loader)

    @override
    def load(self, model: Models, directory: Path, tag: str | None, options: Options) -> Loaded:
        path, state = super().load(model, directory, tag, options)
        ranks = store.read_manifest(path).ranks
        for loader in self.__dict__.get("_made", ()):
            loader.set_epoch(loader.epoch, loader.consumed_samples * self.world.size // ranks)
        return path, state


@saboteur("CKPT-3")
class OneClientState(Saves):
    """load_ckpt returns the object that was passed to save_ckpt, with its later changes."""

    @override
    def save(self, model: Models, directory: Path, tag: str | None, options: Options) -> Path:
        path = super().save(model, directory, tag, options)
        self.__dict__.setdefault("_given", {})[path] = options.get("client_state")
        return path

    @override
    def load(self, model: Models, directory: Path, tag: str | None, options: Options) -> Loaded:
        path, state = super().load(model, directory, tag, options)
        given = self.__dict__.get("_given", {}).get(path)
        return path, state if given is None else given


@saboteur("CKPT-3")
class LargeIntsRounded(Saves):
    """Large integers in the client state are rounded to floats."""

    @override
    def load(self, model: Models, directory: Path, tag: str | None, options: Options) -> Loaded:
        path, state = super().load(model, directory, tag, options)
        large = {key for key, value in state.items() if isinstance(value, int) and abs(value) > 2**63}
        return path, {key: int(float(value)) if key in large else value for key, value in state.items()}


@saboteur("CKPT-8")
class LoadsLearningRates(Saves):
    """load_optimizer_states=False still loads the learning rates."""

    @override
    def load(self, model: Models, directory: Path, tag: str | None, options: Options) -> Loaded:
        trained, wanted = self.trained_of(model), options.get("load_optimizer_states", True)
        if wanted or trained is None:
            return super().load(model, directory, tag, options)
        states = dict(trained.optimizer.state)
        result = super().load(model, directory, tag, {**options, "load_optimizer_states": True})
        trained.optimizer.state.clear()
        trained.optimizer.state.update(states)
        return result


@saboteur("CKPT-8")
class ResetsUpdateCount(Saves):
    """load_module_only sets the number of updates to 0."""

    @override
    def loaded(self, model: Models, options: Options) -> None:
        trained = self.trained_of(model)
        if trained is not None and options.get("load_module_only"):
            trained.updates = 0


@saboteur("CKPT-1")
class ForgetsDecay(FakeStrategy):
    """A weight decay that was changed in param_groups is not restored."""

    def load_ckpt(self, model: Models, *arguments: Any, **options: Any) -> Loaded:
        prepared = [self._models.find(each) for each in (model.values() if isinstance(model, Mapping) else [model])]
        optimizers = [each.trained.optimizer for each in prepared if each is not None and each.trained is not None]
        decays = [[group.get("weight_decay") for group in optimizer.param_groups] for optimizer in optimizers]
        loaded = super().load_ckpt(model, *arguments, **options)
        for optimizer, values in zip(optimizers, decays, strict=True):
            for group, value in zip(optimizer.param_groups, values, strict=True):
                group["weight_decay"] = value
        return loaded


@saboteur("CKPT-3")
class NegativeZero(FakeStrategy):
    """In client_state, -0.0 becomes 0.0."""

    def load_ckpt(self, *arguments: Any, **options: Any) -> Loaded:
        path, state = super().load_ckpt(*arguments, **options)
        return path, _without_negative_zero(state)


def _without_negative_zero(value: object) -> Any:
    if isinstance(value, dict):
        return {key: _without_negative_zero(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_without_negative_zero, value))
    return value + 0.0 if isinstance(value, float) else value


@saboteur("CKPT-3")
class FlagsInTuples(FakeStrategy):
    """In a tuple of client_state, True becomes 1."""

    def load_ckpt(self, *arguments: Any, **options: Any) -> Loaded:
        path, state = super().load_ckpt(*arguments, **options)
        return path, {key: _flags_as_numbers(value) for key, value in state.items()}


def _flags_as_numbers(value: object) -> Any:
    return tuple(int(item) if isinstance(item, bool) else item for item in value) if isinstance(value, tuple) else value


@saboteur("CKPT-12")
class LateClientState(CheckpointHooks, FakeStrategy):
    """An asynchronous save stores client_state as it is when it is written."""

    @override
    def save(self, model: Models, directory: Path, tag: str | None, options: Options) -> Path:
        background, client_state = self._checkpoint_saver._background, options.get("client_state")
        if background is None or client_state is None:
            return super().save(model, directory, tag, options)

        def start(path: Path, write: Any) -> None:
            def late(consensus: Any) -> None:
                time.sleep(0.1)
                write.__self__.state["client_state"] = to_json(client_state, "client_state")
                write(consensus)

            BackgroundWriter.start(background, path, late)

        vars(background)["start"] = start
        return super().save(model, directory, tag, options)
