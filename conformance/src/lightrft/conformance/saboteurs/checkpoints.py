"""Defects of checkpoints."""

import pickle
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch
from weakref import WeakSet

import torch
from torch import nn
from typing_extensions import override

from lightrft.config import CheckpointError
from lightrft.conformance.saboteurs.catalogue import saboteur
from lightrft.conformance.saboteurs.hooks import CheckpointHooks, Loaded, LoaderHooks, Options
from lightrft.conformance.saboteurs.plain import PlainStrategy
from lightrft.strategy import FakeStrategy
from lightrft.strategy.backend import StateSlice, TrainedModel
from lightrft.strategy.checkpoint.background import BackgroundWriter, Staging
from lightrft.strategy.checkpoint.checkpoint_items import Models
from lightrft.strategy.checkpoint.store import Store
from lightrft.strategy.data.loaders import ResumableLoader
from lightrft.strategy.distributed.rank_consensus import RankConsensus
from lightrft.strategy.fake_strategy import FakeBackend

# mypy: disable-error-code="misc"


class Saves(CheckpointHooks, LoaderHooks, FakeStrategy):
    """A strategy that can find the models and loaders whose state it saves and loads."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        self.loaders: WeakSet[ResumableLoader] = WeakSet()
        super().__init__(*arguments, **settings)

    @override
    def loader_made(self, loader: ResumableLoader) -> None:
        self.loaders.add(loader)

    def module_of(self, model: Models) -> nn.Module:
        """Return the first model, unwrapped."""
        return self.unwrap_model(next(iter(model.values())) if isinstance(model, Mapping) else model)

    def trained_of(self, model: Models) -> TrainedModel | None:
        """Return the first model in training, or None."""
        prepared = self._models.find(self.module_of(model))
        return None if prepared is None else prepared.trained


@contextmanager
def without_pending_gradient(trained: TrainedModel | None) -> Iterator[None]:
    """Report in the body that no gradient of ``trained`` is pending."""
    if trained is None:
        yield
        return
    counts = trained.micro_batches, trained.backward_calls
    trained.micro_batches = trained.backward_calls = 0
    try:
        yield
    finally:
        trained.micro_batches, trained.backward_calls = counts


@saboteur("CKPT-1")
class ForgetsRandomStates(Saves):
    """Loading does not restore the random streams."""

    @override
    def load(self, model: Models, directory: Path, tag: str | None, options: Options) -> Loaded:
        before = torch.get_rng_state()
        try:
            return super().load(model, directory, tag, options)
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

    @override
    def loaded(self, model: Models, options: Options) -> None:
        trained = self.trained_of(model)
        if trained is not None:
            trained.skipped_in_a_row = 0


@saboteur("CKPT-1")
class ForgetsThePosition(Saves):
    """After loading, loaders begin at the start of the epoch."""

    @override
    def loaded(self, model: Models, options: Options) -> None:
        for loader in self.loaders:
            loader.set_epoch(loader.epoch, 0)


@saboteur("CKPT-1")
class ForgetsAverages(Saves):
    """After loading, an average moves again for an update that it already contains."""

    @override
    def loaded(self, model: Models, options: Options) -> None:
        for prepared in self._models:
            self._averages.restore(prepared.module, 0)


@saboteur("CKPT-1")
class SavesHalfWay(Saves):
    """Saves between updates, without the pending gradient."""

    @override
    def save(self, model: Models, directory: Path, tag: str | None, options: Options) -> Path:
        with without_pending_gradient(self.trained_of(model)):
            return super().save(model, directory, tag, options)


@saboteur("CKPT-1", world=2)
class OneStream(CheckpointHooks, PlainStrategy):
    """After loading, every rank has rank 0's random streams."""

    @override
    def loaded(self, model: Models, options: Options) -> None:
        torch.set_rng_state(self.all_gather(torch.get_rng_state()[None])[0])


@saboteur("CKPT-2")
class IgnoresTags(Saves):
    """Always loads the newest checkpoint."""

    @override
    def load(self, model: Models, directory: Path, tag: str | None, options: Options) -> Loaded:
        known = {path.name for path in directory.glob("*")}
        return super().load(model, directory, None if tag in known else tag, options)


@saboteur("CKPT-2")
class WrongErrorClass(Saves):
    """The error for a missing tag is a RuntimeError, not a FileNotFoundError."""

    @override
    def load(self, model: Models, directory: Path, tag: str | None, options: Options) -> Loaded:
        try:
            return super().load(model, directory, tag, options)
        except FileNotFoundError as error:
            raise RuntimeError(str(error)) from error


@saboteur("CKPT-3")
class ListsForTuples(Saves):
    """Tuples in the client state come back as lists."""

    @override
    def load(self, model: Models, directory: Path, tag: str | None, options: Options) -> Loaded:
        path, state = super().load(model, directory, tag, options)
        return path, {key: list(value) if isinstance(value, tuple) else value for key, value in state.items()}


@saboteur("CKPT-3")
class StoresReprs(Saves):
    """A client state that cannot be stored is stored as its repr."""

    @override
    def save(self, model: Models, directory: Path, tag: str | None, options: Options) -> Path:
        try:
            return super().save(model, directory, tag, options)
        except TypeError:
            text = repr(options.get("client_state"))
            return super().save(model, directory, tag, {**options, "client_state": {"text": text}})


@saboteur("CKPT-4")
class OneTooMany(Saves):
    """Keeps one checkpoint more than max_num."""

    @override
    def save(self, model: Models, directory: Path, tag: str | None, options: Options) -> Path:
        limit = options.get("max_num", 3)
        return super().save(model, directory, tag, {**options, "max_num": limit and limit + 1})


@saboteur("CKPT-4")
class RemovesAnything(Saves):
    """Rotation removes directories that are not checkpoints."""

    @override
    def save(self, model: Models, directory: Path, tag: str | None, options: Options) -> Path:
        path = super().save(model, directory, tag, options)
        for other in directory.iterdir():
            if other.is_dir() and not (other / "manifest.json").exists():
                shutil.rmtree(other)
        return path


@saboteur("CKPT-4")
class IgnoresSize(Saves):
    """Ignores max_mem."""

    @override
    def save(self, model: Models, directory: Path, tag: str | None, options: Options) -> Path:
        return super().save(model, directory, tag, {**options, "max_mem": max(options.get("max_mem", 1000), 1.0)})


@saboteur("CKPT-5")
class RemovesTheOldFirst(Saves):
    """With max_num=1, the old checkpoint is removed before the new one is committed."""

    @override
    def save(self, model: Models, directory: Path, tag: str | None, options: Options) -> Path:
        if options.get("max_num") == 1:
            for checkpoint in Store(directory).committed():
                shutil.rmtree(checkpoint.path)
        return super().save(model, directory, tag, options)


@saboteur("CKPT-5")
class ManifestFirst(Saves):
    """A checkpoint is copied to its directory file by file, the manifest first."""

    @override
    def save(self, model: Models, directory: Path, tag: str | None, options: Options) -> Path:
        path = super().save(model, directory.with_name("scratch"), tag, {**options, "max_num": 99})
        (directory / path.name).mkdir(parents=True)
        for file in sorted(path.iterdir()):
            shutil.copyfile(file, directory / path.name / file.name)
        return directory / path.name


@saboteur("CKPT-5", world=2)
class LeavesPartialCheckpoints(CheckpointHooks, PlainStrategy):
    """Incomplete checkpoints of killed processes are not removed."""

    @override
    def save(self, model: Models, directory: Path, tag: str | None, options: Options) -> Path:
        with patch.object(Store, "clean"):
            return super().save(model, directory, tag, options)


@saboteur("CKPT-6")
class VerifiesAfterwards(Saves):
    """Changes the model before the checkpoint is verified."""

    @override
    def load(self, model: Models, directory: Path, tag: str | None, options: Options) -> Loaded:
        with torch.no_grad():
            next(self.module_of(model).parameters()).add_(1)
        return super().load(model, directory, tag, options)


@saboteur("CKPT-6")
class FallsBack(Saves):
    """Loading a damaged checkpoint changes nothing and raises nothing."""

    @override
    def load(self, model: Models, directory: Path, tag: str | None, options: Options) -> Loaded:
        try:
            return super().load(model, directory, tag, options)
        except RuntimeError:
            return directory, {}


@saboteur("CKPT-7")
class PrivateLayout(FakeBackend):
    """Optimizer state is saved under the name of another parameter, and only this strategy loads it correctly."""

    @override
    def state_slices(self, trained: TrainedModel) -> list[StateSlice]:
        slices = super().state_slices(trained)
        by_shape: dict[tuple[int, ...], list[int]] = {}
        for index, state_slice in enumerate(slices):
            by_shape.setdefault(state_slice.shard.shape, []).append(index)
        swapped = list(slices)
        for indices in by_shape.values():
            for index, other in zip(indices, indices[1:] + indices[:1], strict=True):
                swapped[index] = StateSlice(shard=slices[index].shard, key=slices[other].key, start=0)
        return swapped


@saboteur("CKPT-8")
class OptimizerWithSchedule(Saves):
    """load_optimizer_states=False does not load the schedule either."""

    @override
    def load(self, model: Models, directory: Path, tag: str | None, options: Options) -> Loaded:
        if not options.get("load_optimizer_states", True):
            options["load_lr_scheduler_states"] = False
        return super().load(model, directory, tag, options)


@saboteur("CKPT-8")
class MoreThanTheModule(Saves):
    """load_module_only restores the random streams too."""

    @override
    def load(self, model: Models, directory: Path, tag: str | None, options: Options) -> Loaded:
        if options.pop("load_module_only", False):
            options |= {"load_optimizer_states": False, "load_lr_scheduler_states": False}
        return super().load(model, directory, tag, options)


@saboteur("CKPT-8")
class NeverStrict(Saves):
    """load_module_strict is ignored: loads the parameters that both have."""

    @override
    def load(self, model: Models, directory: Path, tag: str | None, options: Options) -> Loaded:
        return super().load(model, directory, tag, {**options, "load_module_strict": False})


@saboteur("CKPT-9")
class SavingDraws(Saves):
    """Saving draws from torch's random stream."""

    @override
    def save(self, model: Models, directory: Path, tag: str | None, options: Options) -> Path:
        torch.rand(1)
        return super().save(model, directory, tag, options)


@saboteur("CKPT-9", world=2)
class PathOfEachRank(CheckpointHooks, PlainStrategy):
    """Each rank returns a different path."""

    @override
    def save(self, model: Models, directory: Path, tag: str | None, options: Options) -> Path:
        return super().save(model, directory, tag, options) / f"rank{self.world.rank}"


@saboteur("CKPT-10")
class Unpickles(Saves):
    """Unpickles a file in the checkpoint."""

    @override
    def load(self, model: Models, directory: Path, tag: str | None, options: Options) -> Loaded:
        extra = directory / str(tag) / "client_state.pt"
        if extra.exists():
            with extra.open("rb") as file:
                pickle.load(file)  # noqa: S301 - the defect
        return super().load(model, directory, tag, options)


@saboteur("CKPT-11", world=2)
class OnlyRank0Raises(CheckpointHooks, PlainStrategy):
    """If saving fails, only rank 0 raises."""

    @override
    def save(self, model: Models, directory: Path, tag: str | None, options: Options) -> Path:
        try:
            return super().save(model, directory, tag, options)
        except RuntimeError:
            if self.world.rank == 0:
                raise
            return directory


@saboteur("CKPT-11")
class RemovesFirst(Saves):
    """Old checkpoints are removed before the new one is written."""

    @override
    def save(self, model: Models, directory: Path, tag: str | None, options: Options) -> Path:
        if directory.is_dir():
            for other in directory.iterdir():
                if (other / "manifest.json").exists():
                    shutil.rmtree(other)
        return super().save(model, directory, tag, options)


@saboteur("CKPT-11")
class LosesFailures(CheckpointHooks, FakeStrategy):
    """The error of a save in the background is never raised."""

    @override
    def save(self, model: Models, directory: Path, tag: str | None, options: Options) -> Path:
        with suppress(CheckpointError):
            self._checkpoint_saver.finish()
        return super().save(model, directory, tag, options)


@saboteur("CKPT-12")
class StoresLater(CheckpointHooks, FakeStrategy):
    """An asynchronous save stores the weights as they are 0.3 s later, not as they were at the call."""

    @override
    def save(self, model: Models, directory: Path, tag: str | None, options: Options) -> Path:
        run = BackgroundWriter._run

        def run_later(background: BackgroundWriter, path: Path, write: Callable[[RankConsensus], None]) -> None:
            time.sleep(0.3)
            run(background, path, write)

        share_memory = patch.object(Staging, "copies", lambda staging, tensors: tensors)
        with share_memory, patch.object(BackgroundWriter, "_run", run_later):
            return super().save(model, directory, tag, options)


@saboteur("CKPT-4")
class IgnoresKeep(CheckpointHooks, FakeStrategy):
    """Rotation removes what is to be kept."""

    @override
    def save(self, model: Models, directory: Path, tag: str | None, options: Options) -> Path:
        return super().save(model, directory, tag, {**options, "keep": ()})


@saboteur("CKPT-13")
class CountsBatches(Saves):
    """The position in the data is restored as a number of batches."""

    size: ClassVar[int] = 1
    """Samples of a batch when the checkpoint was saved."""

    @override
    def save(self, model: Models, directory: Path, tag: str | None, options: Options) -> Path:
        for loader in self.loaders:
            CountsBatches.size = loader.batch_size or 1
        return super().save(model, directory, tag, options)

    @override
    def loaded(self, model: Models, options: Options) -> None:
        for loader in self.loaders:
            loader.set_epoch(loader.epoch, loader.consumed_samples // self.size * (loader.batch_size or 1))


@saboteur("CKPT-13")
class KeepsTheMicroBatches(Saves):
    """After loading, an update takes as many micro-batches as before."""

    steps: ClassVar[int] = 1
    """Micro-batches of an update when the checkpoint was saved."""

    @override
    def save(self, model: Models, directory: Path, tag: str | None, options: Options) -> Path:
        KeepsTheMicroBatches.steps = self.accumulated_gradient
        return super().save(model, directory, tag, options)

    @override
    def loaded(self, model: Models, options: Options) -> None:
        trained = self.trained_of(model)
        if trained is not None:
            trained.accumulation_steps = self.steps
