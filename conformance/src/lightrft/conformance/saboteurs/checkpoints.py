"""Defects of checkpoints."""

import os
import pickle
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch
from weakref import WeakSet

import torch
from torch import nn
from typing_extensions import override

from lightrft.config import CheckpointError
from lightrft.conformance.saboteurs.catalogue import saboteur
from lightrft.conformance.saboteurs.plain import PlainStrategy
from lightrft.strategy import FakeStrategy
from lightrft.strategy.backend import StateSlice, TrainedModel
from lightrft.strategy.checkpoint.background import BackgroundWriter, Staging
from lightrft.strategy.checkpoint.store import Store
from lightrft.strategy.data.loaders import ResumableLoader
from lightrft.strategy.fake_strategy import FakeBackend

# mypy: disable-error-code="misc, override"


class Saves(FakeStrategy):
    """A strategy that can find the models and loaders whose state it saves and loads."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        self.loaders: WeakSet[ResumableLoader] = WeakSet()
        super().__init__(*arguments, **settings)

    def setup_dataloader(self, *arguments: Any, **more: Any) -> Any:
        loader = super().setup_dataloader(*arguments, **more)
        if isinstance(loader, ResumableLoader):
            self.loaders.add(loader)
        return loader

    def module_of(self, model: Any) -> nn.Module:
        """Return the first model, unwrapped."""
        return self.unwrap_model(next(iter(model.values())) if isinstance(model, Mapping) else model)

    def trained_of(self, model: Any) -> TrainedModel | None:
        """Return the first model in training, or None."""
        prepared = self._models.find(self.module_of(model))
        return None if prepared is None else prepared.trained


@saboteur("CKPT-1")
class ForgetsStreams(Saves):
    """Loading does not restore the random streams."""

    def load_ckpt(self, model: Any, *arguments: Any, **more: Any) -> Any:
        before = torch.get_rng_state()
        try:
            return super().load_ckpt(model, *arguments, **more)
        finally:
            torch.set_rng_state(before)


@saboteur("CKPT-1")
class ForgetsMoments(FakeBackend):
    """The optimizer's state is not in the checkpoint."""

    @override
    def state_slices(self, trained: TrainedModel) -> list[StateSlice]:
        return []


@saboteur("CKPT-1")
class ForgetsSkips(Saves):
    """Loading sets the count of updates skipped in a row to 0."""

    def load_ckpt(self, model: Any, *arguments: Any, **more: Any) -> Any:
        result = super().load_ckpt(model, *arguments, **more)
        trained = self.trained_of(model)
        if trained is not None:
            trained.skipped_in_a_row = 0
        return result


@saboteur("CKPT-1")
class ForgetsThePosition(Saves):
    """After loading, loaders begin at the start of the epoch."""

    def load_ckpt(self, *arguments: Any, **more: Any) -> Any:
        result = super().load_ckpt(*arguments, **more)
        for loader in self.loaders:
            loader.set_epoch(loader.epoch, 0)
        return result


@saboteur("CKPT-1")
class ForgetsAverages(Saves):
    """After loading, an average moves again for an update that it already contains."""

    def load_ckpt(self, model: Any, *arguments: Any, **more: Any) -> Any:
        result = super().load_ckpt(model, *arguments, **more)
        self._averages.seen.clear()
        return result


@saboteur("CKPT-1")
class SavesHalfWay(Saves):
    """Saves between updates, without the pending gradient."""

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
    """After loading, every rank has rank 0's random streams."""

    def load_ckpt(self, model: Any, *arguments: Any, **more: Any) -> Any:
        result = super().load_ckpt(model, *arguments, **more)
        torch.set_rng_state(self.all_gather(torch.get_rng_state()[None])[0])
        return result


@saboteur("CKPT-2")
class IgnoresTags(Saves):
    """Always loads the newest checkpoint."""

    def load_ckpt(self, model: Any, load_dir: Any, tag: str | None = None, **more: Any) -> Any:
        known = {path.name for path in Path(load_dir).glob("*")}
        return super().load_ckpt(model, load_dir, None if tag in known else tag, **more)


@saboteur("CKPT-2")
class OwnError(Saves):
    """The error for a missing tag is a RuntimeError, not a FileNotFoundError."""

    def load_ckpt(self, model: Any, *arguments: Any, **more: Any) -> Any:
        try:
            return super().load_ckpt(model, *arguments, **more)
        except FileNotFoundError as error:
            raise RuntimeError(str(error)) from error


@saboteur("CKPT-3")
class ListsForTuples(Saves):
    """Tuples in the client state come back as lists."""

    def load_ckpt(self, model: Any, *arguments: Any, **more: Any) -> Any:
        path, state = super().load_ckpt(model, *arguments, **more)
        return path, {key: list(value) if isinstance(value, tuple) else value for key, value in state.items()}


@saboteur("CKPT-3")
class StoresReprs(Saves):
    """A client state that cannot be stored is stored as its repr."""

    def save_ckpt(self, model: Any, *arguments: Any, client_state: Any = None, **more: Any) -> Any:
        try:
            return super().save_ckpt(model, *arguments, client_state=client_state, **more)
        except TypeError:
            return super().save_ckpt(model, *arguments, client_state={"text": repr(client_state)}, **more)


@saboteur("CKPT-4")
class OneTooMany(Saves):
    """Keeps one checkpoint more than max_num."""

    def save_ckpt(self, model: Any, *arguments: Any, max_num: int = 3, **more: Any) -> Any:
        return super().save_ckpt(model, *arguments, max_num=max_num and max_num + 1, **more)


@saboteur("CKPT-4")
class RemovesAnything(Saves):
    """Rotation removes directories that are not checkpoints."""

    def save_ckpt(self, model: Any, save_dir: Any, *arguments: Any, **more: Any) -> Any:
        path = super().save_ckpt(model, save_dir, *arguments, **more)
        for other in Path(save_dir).iterdir():
            if other.is_dir() and not (other / "manifest.json").exists():
                shutil.rmtree(other)
        return path


@saboteur("CKPT-4")
class IgnoresSize(Saves):
    """Ignores max_mem."""

    def save_ckpt(self, model: Any, *arguments: Any, max_mem: float = 1000, **more: Any) -> Any:
        return super().save_ckpt(model, *arguments, max_mem=max(max_mem, 1.0), **more)


@saboteur("CKPT-5")
class RemovesTheOldFirst(Saves):
    """With max_num=1, the old checkpoint is removed before the new one is committed."""

    def save_ckpt(self, model: Any, save_dir: Any, *arguments: Any, **more: Any) -> Any:
        if more.get("max_num") == 1:
            for checkpoint in Store(Path(save_dir)).committed():
                shutil.rmtree(checkpoint.path)
        return super().save_ckpt(model, save_dir, *arguments, **more)


@saboteur("CKPT-5")
class ManifestFirst(Saves):
    """A checkpoint is copied to its directory file by file, the manifest first."""

    def save_ckpt(self, model: Any, save_dir: Any, *arguments: Any, tag: Any = None, **more: Any) -> Any:
        directory, more = Path(save_dir), {**more, "max_num": 99}
        path = super().save_ckpt(model, directory.with_name("scratch"), *arguments, tag=tag, **more)
        (directory / path.name).mkdir(parents=True)
        for file in sorted(path.iterdir()):
            shutil.copyfile(file, directory / path.name / file.name)
        return directory / path.name


@saboteur("CKPT-5", world=2)
class LeavesRubbish(PlainStrategy):
    """Incomplete checkpoints of killed processes are not removed."""

    def save_ckpt(self, model: Any, save_dir: Any, *arguments: Any, **more: Any) -> Any:
        with patch.object(Store, "clean"):
            return super().save_ckpt(model, save_dir, *arguments, **more)


@saboteur("CKPT-6")
class LooksAfterwards(Saves):
    """Changes the model before the checkpoint is verified."""

    def load_ckpt(self, model: Any, *arguments: Any, **more: Any) -> Any:
        with torch.no_grad():
            next(self.module_of(model).parameters()).add_(1)
        return super().load_ckpt(model, *arguments, **more)


@saboteur("CKPT-6")
class FallsBack(Saves):
    """Loading a damaged checkpoint changes nothing and raises nothing."""

    def load_ckpt(self, model: Any, load_dir: Any, *arguments: Any, **more: Any) -> Any:
        try:
            return super().load_ckpt(model, load_dir, *arguments, **more)
        except RuntimeError:
            return Path(load_dir), {}


@saboteur("CKPT-7")
class OwnLayout(FakeBackend):
    """Optimizer state is saved under the name of another parameter, and only this strategy loads it correctly."""

    @override
    def state_slices(self, trained: TrainedModel) -> list[StateSlice]:
        slices = super().state_slices(trained)
        by_shape: dict[Any, list[int]] = {}
        for index, state_slice in enumerate(slices):
            by_shape.setdefault(state_slice.shard.shape, []).append(index)
        swapped = list(slices)
        for indices in by_shape.values():
            for index, other in zip(indices, indices[1:] + indices[:1], strict=True):
                swapped[index] = StateSlice(shard=slices[index].shard, key=slices[other].key, start=0)
        return swapped


@saboteur("CKPT-8")
class AllOrNothing(Saves):
    """load_optimizer_states=False does not load the schedule either."""

    def load_ckpt(self, model: Any, *arguments: Any, load_optimizer_states: bool = True, **more: Any) -> Any:
        if not load_optimizer_states:
            more["load_lr_scheduler_states"] = False
        return super().load_ckpt(model, *arguments, load_optimizer_states=load_optimizer_states, **more)


@saboteur("CKPT-8")
class MoreThanTheModule(Saves):
    """load_module_only restores the random streams too."""

    def load_ckpt(self, model: Any, *arguments: Any, load_module_only: bool = False, **more: Any) -> Any:
        if load_module_only:
            more |= {"load_optimizer_states": False, "load_lr_scheduler_states": False}
        return super().load_ckpt(model, *arguments, **more)


@saboteur("CKPT-8")
class NeverStrict(Saves):
    """load_module_strict is ignored: loads the parameters that both have."""

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
    """Each rank returns a different path."""

    def save_ckpt(self, model: Any, *arguments: Any, **more: Any) -> Any:
        path = super().save_ckpt(model, *arguments, **more)
        return path / f"rank{self.world.rank}"


@saboteur("CKPT-10")
class Unpickles(Saves):
    """Unpickles a file that lies in the checkpoint."""

    def load_ckpt(self, model: Any, load_dir: Any, tag: str | None = None, **more: Any) -> Any:
        extra = Path(load_dir) / str(tag) / "client_state.pt"
        if extra.exists():
            with extra.open("rb") as file:
                pickle.load(file)  # noqa: S301 - the defect
        return super().load_ckpt(model, load_dir, tag, **more)


@saboteur("CKPT-11", world=2)
class Alone(PlainStrategy):
    """If saving fails, only rank 0 raises."""

    def save_ckpt(self, model: Any, *arguments: Any, **more: Any) -> Any:
        try:
            return super().save_ckpt(model, *arguments, **more)
        except RuntimeError:
            if self.world.rank == 0:
                raise
            return Path(arguments[0])


@saboteur("CKPT-11")
class RemovesFirst(Saves):
    """Old checkpoints are removed before the new one is written."""

    def save_ckpt(self, model: Any, save_dir: Any, *arguments: Any, **more: Any) -> Any:
        if os.path.isdir(save_dir):
            for other in Path(save_dir).iterdir():
                if (other / "manifest.json").exists():
                    shutil.rmtree(other)
        return super().save_ckpt(model, save_dir, *arguments, **more)


@saboteur("CKPT-11")
class LosesFailures(FakeStrategy):
    """The error of a save in the background is never raised."""

    def save_ckpt(self, *arguments: Any, **more: Any) -> Any:
        with suppress(CheckpointError):
            self._checkpoint_saver.finish()
        return super().save_ckpt(*arguments, **more)


@saboteur("CKPT-12")
class StoresLater(FakeStrategy):
    """An asynchronous save stores the weights as they are 0.3 s later, not as they were at the call."""

    def save_ckpt(self, *arguments: Any, **more: Any) -> Any:
        run = BackgroundWriter._run

        def run_later(background: BackgroundWriter, path: Path, write: Any) -> None:
            time.sleep(0.3)
            run(background, path, write)

        share_memory = patch.object(Staging, "copies", lambda staging, tensors: tensors)
        with share_memory, patch.object(BackgroundWriter, "_run", run_later):
            return super().save_ckpt(*arguments, **more)
