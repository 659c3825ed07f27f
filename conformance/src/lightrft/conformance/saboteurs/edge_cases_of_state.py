"""Defects in one edge case of data, checkpoints and export."""

import pickle
import random
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from typing_extensions import override

from lightrft.conformance.saboteurs.catalogue import saboteur
from lightrft.conformance.saboteurs.checkpoints import Saves, without_pending_gradient
from lightrft.conformance.saboteurs.data import RepeatsAnOrder, WithSampler
from lightrft.conformance.saboteurs.hooks import CheckpointHooks, Loaded, LoaderHooks, Options
from lightrft.conformance.saboteurs.plain import PlainStrategy
from lightrft.strategy import FakeStrategy
from lightrft.strategy.checkpoint import store
from lightrft.strategy.checkpoint.checkpoint_items import Models
from lightrft.strategy.checkpoint.format import Manifest
from lightrft.strategy.checkpoint.load_checkpoint import CheckpointLoading
from lightrft.strategy.checkpoint.save_checkpoint import TagWriter
from lightrft.strategy.checkpoint.store import Store
from lightrft.strategy.data.loaders import ResumableLoader

# mypy: disable-error-code="misc"


class TwoOrders(RepeatsAnOrder):
    """Epoch 1 and later epochs have one order."""

    last = 1


@saboteur("DATA-3")
class LaterEpochsEqual(WithSampler, FakeStrategy):
    """The second and all later epochs have the same order."""

    sampler = TwoOrders


@saboteur("DATA-2")
class SkipsInEveryEpoch(LoaderHooks, FakeStrategy):
    """consumed_samples is skipped in every epoch, not only in the first."""

    @override
    def loader_made(self, loader: ResumableLoader) -> None:
        set_epoch, first = loader.set_epoch, loader.consumed_samples
        vars(loader)["set_epoch"] = lambda epoch, consumed=None: set_epoch(epoch, consumed or first or None)


@saboteur("DATA-2")
class SkipsAgainLater(LoaderHooks, FakeStrategy):
    """consumed_samples is skipped again in the third epoch after the resumed one."""

    @override
    def loader_made(self, loader: ResumableLoader) -> None:
        set_epoch, first = loader.set_epoch, loader.consumed_samples
        resumed: list[int] = []

        def skip_again(epoch: int, consumed: int | None = None) -> None:
            resumed.append(epoch)
            set_epoch(epoch, first if consumed is None and first and epoch == resumed[0] + 3 else consumed)

        vars(loader)["set_epoch"] = skip_again


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


@saboteur("CKPT-2")
class KeepsTheOld(Saves):
    """Saving under an existing tag does nothing."""

    @override
    def save(self, model: Models, directory: Path, tag: str | None, options: Options) -> Path:
        if tag is not None and (directory / tag).is_dir():
            return directory / tag
        return super().save(model, directory, tag, options)


@saboteur("CKPT-2")
class AlwaysLatest(Saves):
    """save_latest is ignored."""

    @override
    def save(self, model: Models, directory: Path, tag: str | None, options: Options) -> Path:
        return super().save(model, directory, tag, {**options, "save_latest": True})


@saboteur("CKPT-2")
class LastByName(Saves):
    """Without a tag, the last checkpoint by name is loaded."""

    @override
    def load(self, model: Models, directory: Path, tag: str | None, options: Options) -> Loaded:
        tags = sorted(checkpoint.tag for checkpoint in Store(directory).committed())
        return super().load(model, directory, tags[-1] if tag is None and tags else tag, options)


@saboteur("CKPT-2")
class FallsBackToHidden(Saves):
    """Without a tag, if no checkpoint was saved with save_latest, the newest of the others is loaded."""

    @override
    def load(self, model: Models, directory: Path, tag: str | None, options: Options) -> Loaded:
        try:
            return super().load(model, directory, tag, options)
        except FileNotFoundError:
            committed = Store(directory).committed() if directory.is_dir() else []
            if tag is not None or not committed:
                raise
            return super().load(model, directory, committed[-1].tag, options)


@saboteur("CKPT-4")
class KeepsHidden(Saves):
    """Checkpoints saved without save_latest are never deleted."""

    @override
    def save(self, model: Models, directory: Path, tag: str | None, options: Options) -> Path:
        remove = store._remove
        kept = lambda target: None if not store.read_manifest(target).latest else remove(target)  # noqa: E731
        with patch.object(store, "_remove", kept):
            return super().save(model, directory, tag, options)


@saboteur("CKPT-4")
class DeletesTheLoadable(Saves):
    """Saving without save_latest deletes the newest checkpoint that loads without a tag."""

    @override
    def save(self, model: Models, directory: Path, tag: str | None, options: Options) -> Path:
        path = super().save(model, directory, tag, options)
        tags = [checkpoint.tag for checkpoint in Store(directory).committed()]
        if not options.get("save_latest", True) and len(tags) >= options.get("max_num", 3):
            shutil.rmtree(directory / tags[0])
        return path


@saboteur("CKPT-5")
class RemovesTheReplaced(Saves):
    """Saving under an existing tag removes that checkpoint before the new one is in its place."""

    @override
    def save(self, model: Models, directory: Path, tag: str | None, options: Options) -> Path:
        commit = TagWriter.commit

        def remove_and_commit(writer: TagWriter, manifest: Manifest) -> None:
            if writer.target.exists():
                for file in writer.target.iterdir():
                    file.unlink()
                writer.target.rmdir()
            commit(writer, manifest)

        with patch.object(TagWriter, "commit", remove_and_commit):
            return super().save(model, directory, tag, options)


@saboteur("CKPT-11")
class RemovesTheReplacedFirst(Saves):
    """Saving under an existing tag removes that checkpoint before anything is written."""

    @override
    def save(self, model: Models, directory: Path, tag: str | None, options: Options) -> Path:
        if tag is not None and (directory / tag).is_dir():
            shutil.rmtree(directory / tag)
        return super().save(model, directory, tag, options)


@saboteur("CKPT-10")
class ExtraPickle(Saves):
    """Checkpoints contain a pickle, which loading unpickles after the other files were verified."""

    @override
    def save(self, model: Models, directory: Path, tag: str | None, options: Options) -> Path:
        path = super().save(model, directory, tag, options)
        (path / "run.meta").write_bytes(pickle.dumps({"saved": True}))
        return path

    @override
    def load(self, model: Models, directory: Path, tag: str | None, options: Options) -> Loaded:
        path, state = super().load(model, directory, tag, options)
        if (path / "run.meta").exists():
            pickle.loads((path / "run.meta").read_bytes())  # noqa: S301 - the defect
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


@saboteur("CKPT-6")
class OptimizerUnverified(Saves):
    """The optimizer's state is not verified before it is loaded."""

    @override
    def load(self, model: Models, directory: Path, tag: str | None, options: Options) -> Loaded:
        is_loaded = CheckpointLoading._is_loaded
        without_optimizer = lambda loading, parts, names: "optimizer" not in parts and is_loaded(loading, parts, names)  # noqa: E731
        with patch.object(CheckpointLoading, "_is_loaded", without_optimizer):
            return super().load(model, directory, tag, options)


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


@saboteur("EXPORT-1")
class ExportsHalfByDefault(FakeStrategy):
    """Without dtype, weights are written as fp16."""

    def save_model(self, *arguments: Any, dtype: torch.dtype | None = None, **more: Any) -> Path:
        return super().save_model(*arguments, dtype=dtype or torch.float16, **more)
