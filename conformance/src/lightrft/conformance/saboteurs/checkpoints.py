"""Defects of checkpoints."""

import os
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from typing_extensions import override

from lightrft.conformance.saboteurs.catalogue import saboteur
from lightrft.conformance.saboteurs.plain import PlainStrategy
from lightrft.strategy import FakeStrategy
from lightrft.strategy.checkpoint.checkpoints import Checkpoints
from lightrft.strategy.checkpoint.store import Store
from lightrft.strategy.shards import StateSlice
from lightrft.strategy.training.trained_model import TrainedModel

# mypy: disable-error-code="misc, override"


class Saves(FakeStrategy):
    """A strategy with a way of its own to save and load."""

    def module_of(self, model: Any) -> nn.Module:
        """The first model, bare."""
        return self.unwrap_model(next(iter(model.values())) if isinstance(model, Mapping) else model)

    def trained_of(self, model: Any) -> TrainedModel | None:
        """What trains it."""
        found = self._models.find(self.module_of(model))
        return None if found is None else found.trained


@saboteur("CKPT-1")
class ForgetsStreams(Saves):
    """Loading leaves the random streams where they are."""

    def load_ckpt(self, model: Any, *arguments: Any, **more: Any) -> Any:
        before = torch.get_rng_state()
        try:
            return super().load_ckpt(model, *arguments, **more)
        finally:
            torch.set_rng_state(before)


@saboteur("CKPT-1")
class ForgetsMoments(FakeStrategy):
    """The optimizer's state is not in the checkpoint."""

    @override
    def _state_slices(self, trained: TrainedModel) -> list[StateSlice]:
        return []


@saboteur("CKPT-1")
class ForgetsSkips(Saves):
    """The count of skips in a row begins anew."""

    def load_ckpt(self, model: Any, *arguments: Any, **more: Any) -> Any:
        result = super().load_ckpt(model, *arguments, **more)
        trained = self.trained_of(model)
        if trained is not None:
            trained.skipped_in_a_row = 0
        return result


@saboteur("CKPT-1")
class ForgetsThePosition(Saves):
    """Loaders begin at the start of the epoch."""

    def load_ckpt(self, model: Any, *arguments: Any, **more: Any) -> Any:
        result = super().load_ckpt(model, *arguments, **more)
        for loader in self._checkpoints.loaders._living:
            loader.set_epoch(loader.epoch, 0)
        return result


@saboteur("CKPT-1")
class ForgetsAverages(Saves):
    """An average moves once more for an update that it has seen."""

    def load_ckpt(self, model: Any, *arguments: Any, **more: Any) -> Any:
        result = super().load_ckpt(model, *arguments, **more)
        self._averages._seen.clear()
        return result


@saboteur("CKPT-1")
class SavesHalfWay(Saves):
    """Saves with a gradient pending, which is then lost."""

    def save_ckpt(self, model: Any, *arguments: Any, **more: Any) -> Any:
        trained = self.trained_of(model)
        pending = (0, 0) if trained is None else (trained.micro_batches, trained.backwards)
        if trained is not None:
            trained.micro_batches = trained.backwards = 0
        try:
            return super().save_ckpt(model, *arguments, **more)
        finally:
            if trained is not None:
                trained.micro_batches, trained.backwards = pending


@saboteur("CKPT-1", world=2)
class OneStream(PlainStrategy):
    """Every rank goes on with rank 0's random streams."""

    def load_ckpt(self, model: Any, *arguments: Any, **more: Any) -> Any:
        result = super().load_ckpt(model, *arguments, **more)
        torch.set_rng_state(self.all_gather(torch.get_rng_state()[None])[0])
        return result


@saboteur("CKPT-2")
class IgnoresTags(Saves):
    """Always loads the newest."""

    def load_ckpt(self, model: Any, load_dir: Any, tag: str | None = None, **more: Any) -> Any:
        known = {path.name for path in Path(load_dir).glob("*")}
        return super().load_ckpt(model, load_dir, None if tag in known else tag, **more)


@saboteur("CKPT-2")
class OwnError(Saves):
    """A tag that is not there is an error like any other."""

    def load_ckpt(self, model: Any, *arguments: Any, **more: Any) -> Any:
        try:
            return super().load_ckpt(model, *arguments, **more)
        except FileNotFoundError as error:
            raise RuntimeError(str(error)) from error


@saboteur("CKPT-3")
class ListsForTuples(Saves):
    """The client state goes through plain JSON."""

    def load_ckpt(self, model: Any, *arguments: Any, **more: Any) -> Any:
        path, state = super().load_ckpt(model, *arguments, **more)
        return path, {key: list(item) if isinstance(item, tuple) else item for key, item in state.items()}


@saboteur("CKPT-3")
class StoresReprs(Saves):
    """What cannot be stored is stored as text."""

    def save_ckpt(self, model: Any, *arguments: Any, client_state: Any = None, **more: Any) -> Any:
        try:
            return super().save_ckpt(model, *arguments, client_state=client_state, **more)
        except TypeError:
            return super().save_ckpt(model, *arguments, client_state={"text": repr(client_state)}, **more)


@saboteur("CKPT-4")
class OneTooMany(Saves):
    """Keeps one checkpoint more than asked for."""

    def save_ckpt(self, model: Any, *arguments: Any, max_num: int = 3, **more: Any) -> Any:
        return super().save_ckpt(model, *arguments, max_num=max_num and max_num + 1, **more)


@saboteur("CKPT-4")
class RemovesAnything(Saves):
    """Rotation takes every directory for a checkpoint."""

    def save_ckpt(self, model: Any, save_dir: Any, *arguments: Any, **more: Any) -> Any:
        path = super().save_ckpt(model, save_dir, *arguments, **more)
        for other in Path(save_dir).iterdir():
            if other.is_dir() and not (other / "manifest.json").exists():
                shutil.rmtree(other)
        return path


@saboteur("CKPT-4")
class IgnoresSize(Saves):
    """Rotates by number alone."""

    def save_ckpt(self, model: Any, *arguments: Any, max_mem: float = 1000, **more: Any) -> Any:
        return super().save_ckpt(model, *arguments, max_mem=max(max_mem, 1.0), **more)


@saboteur("CKPT-5")
class RemovesTheOldFirst(Saves):
    """What is to be rotated goes before the new checkpoint is there."""

    def save_ckpt(self, model: Any, save_dir: Any, *arguments: Any, **more: Any) -> Any:
        if more.get("max_num") == 1:
            for it in Store(Path(save_dir)).committed():
                shutil.rmtree(it.path)
        return super().save_ckpt(model, save_dir, *arguments, **more)


@saboteur("CKPT-5")
class ManifestFirst(Saves):
    """A checkpoint is copied to its place file by file, the manifest first."""

    def save_ckpt(self, model: Any, save_dir: Any, *arguments: Any, tag: Any = None, **more: Any) -> Any:
        place, more = Path(save_dir), {**more, "max_num": 99}
        path = super().save_ckpt(model, place.with_name("scratch"), *arguments, tag=tag, **more)
        (place / path.name).mkdir(parents=True)
        for file in sorted(path.iterdir()):
            shutil.copyfile(file, place / path.name / file.name)
        return place / path.name


@saboteur("CKPT-5", world=2)
class LeavesRubbish(PlainStrategy):
    """What was half-written stays."""

    def save_ckpt(self, model: Any, save_dir: Any, *arguments: Any, **more: Any) -> Any:
        with patch("lightrft.strategy.checkpoint.leftovers.clean"):
            return super().save_ckpt(model, save_dir, *arguments, **more)


@saboteur("CKPT-6")
class LooksAfterwards(Saves):
    """Changes the model before it has verified anything."""

    def load_ckpt(self, model: Any, *arguments: Any, **more: Any) -> Any:
        with torch.no_grad():
            next(self.module_of(model).parameters()).add_(1)
        return super().load_ckpt(model, *arguments, **more)


@saboteur("CKPT-6")
class FallsBack(Saves):
    """Takes a damaged checkpoint for none, and goes on as it is."""

    def load_ckpt(self, model: Any, load_dir: Any, *arguments: Any, **more: Any) -> Any:
        try:
            return super().load_ckpt(model, load_dir, *arguments, **more)
        except RuntimeError:
            return Path(load_dir), {}


@saboteur("CKPT-7")
class OwnLayout(FakeStrategy):
    """Writes the state of one parameter under the name of another: right for itself alone."""

    @override
    def _state_slices(self, trained: TrainedModel) -> list[StateSlice]:
        slices = super()._state_slices(trained)
        by_shape: dict[Any, list[int]] = {}
        for index, it in enumerate(slices):
            by_shape.setdefault(it.shard.shape, []).append(index)
        swapped = list(slices)
        for indices in by_shape.values():
            for index, other in zip(indices, indices[1:] + indices[:1], strict=True):
                swapped[index] = StateSlice(shard=slices[index].shard, key=slices[other].key, start=0)
        return swapped


@saboteur("CKPT-8")
class AllOrNothing(Saves):
    """load_optimizer_states=False leaves out the schedule too."""

    def load_ckpt(self, model: Any, *arguments: Any, load_optimizer_states: bool = True, **more: Any) -> Any:
        if not load_optimizer_states:
            more["load_lr_scheduler_states"] = False
        return super().load_ckpt(model, *arguments, load_optimizer_states=load_optimizer_states, **more)


@saboteur("CKPT-8")
class MoreThanTheModule(Saves):
    """load_module_only restores the random streams as well."""

    def load_ckpt(self, model: Any, *arguments: Any, load_module_only: bool = False, **more: Any) -> Any:
        if load_module_only:
            more |= {"load_optimizer_states": False, "load_lr_scheduler_states": False}
        return super().load_ckpt(model, *arguments, **more)


@saboteur("CKPT-8")
class NeverStrict(Saves):
    """Loads what fits, whatever was asked."""

    def load_ckpt(self, model: Any, *arguments: Any, load_module_strict: bool = True, **more: Any) -> Any:
        return super().load_ckpt(model, *arguments, load_module_strict=False, **more)


@saboteur("CKPT-9")
class DrawsATag(Saves):
    """Saving draws from torch's random stream."""

    def save_ckpt(self, model: Any, *arguments: Any, **more: Any) -> Any:
        torch.rand(1)
        return super().save_ckpt(model, *arguments, **more)


@saboteur("CKPT-9", world=2)
class PathsOfItsOwn(PlainStrategy):
    """Each rank returns the path of its own file."""

    def save_ckpt(self, model: Any, *arguments: Any, **more: Any) -> Any:
        path = super().save_ckpt(model, *arguments, **more)
        return path / f"rank{self.world.rank}"


@saboteur("CKPT-10")
class Unpickles(Saves):
    """Reads a pickle where one lies beside the checkpoint."""

    def load_ckpt(self, model: Any, load_dir: Any, tag: str | None = None, **more: Any) -> Any:
        extra = Path(load_dir) / str(tag) / "client_state.pt"
        if extra.exists():
            with extra.open("rb") as file:
                pickle.load(file)  # noqa: S301 - the defect
        return super().load_ckpt(model, load_dir, tag, **more)


@saboteur("CKPT-11", world=2)
class Alone(PlainStrategy):
    """A rank that could not write keeps it to itself; the others go on as if all were well."""

    def save_ckpt(self, model: Any, *arguments: Any, **more: Any) -> Any:
        try:
            return super().save_ckpt(model, *arguments, **more)
        except RuntimeError:
            if self.world.rank == 0:
                raise
            return Path(arguments[0])


@saboteur("CKPT-11")
class RemovesFirst(Saves):
    """Makes room for the new checkpoint before it is written."""

    def save_ckpt(self, model: Any, save_dir: Any, *arguments: Any, **more: Any) -> Any:
        if os.path.isdir(save_dir):
            for other in Path(save_dir).iterdir():
                if (other / "manifest.json").exists():
                    shutil.rmtree(other)
        return super().save_ckpt(model, save_dir, *arguments, **more)


@saboteur("CKPT-11")
class LosesFailures(Saves):
    """What goes wrong in the background is never told."""

    def save_ckpt(self, model: Any, *arguments: Any, **more: Any) -> Any:
        background = self._checkpoints._background
        if background is not None:
            if background._thread is not None:
                background._thread.join()
            background._failure = None
        return super().save_ckpt(model, *arguments, **more)


class _SharesMemory(Checkpoints):
    """Writes in the background from the model's own memory, a while later."""

    @override
    def save(self, *arguments: Any, **more: Any) -> Path:
        from lightrft.strategy.checkpoint.background import Background
        from lightrft.strategy.checkpoint.saving import Saving

        original, write = Saving.detached, Saving.write

        def later(saving: Saving, agreement: Any) -> Path:
            import time

            time.sleep(0.3)
            return write(saving, agreement)

        Saving.detached, Saving.write = lambda it, _: it, later  # type: ignore[method-assign, assignment]
        try:
            assert isinstance(self._background, Background)
            return super().save(*arguments, **more)
        finally:
            Saving.detached = original  # type: ignore[method-assign]


@saboteur("CKPT-12")
class StoresLater(FakeStrategy):
    """An asynchronous save stores what the weights have become when it gets to them."""

    def save_ckpt(self, model: Any, *arguments: Any, **more: Any) -> Any:
        if self._checkpoints._background is not None:
            self._checkpoints.__class__ = _SharesMemory
        return super().save_ckpt(model, *arguments, **more)
