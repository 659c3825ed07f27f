"""Defects of lifecycle, ranks, printing and logging."""

import logging
import os
import random
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import BinaryIO

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from typing_extensions import override

from lightrft.config import ConfigError, StrategyConfig
from lightrft.conformance.saboteurs.catalogue import saboteur
from lightrft.conformance.saboteurs.hooks import CheckpointHooks, Options, StepHooks
from lightrft.conformance.saboteurs.plain import PlainStrategy
from lightrft.strategy import FakeStrategy, StepResult
from lightrft.strategy.backend import ReplicatedBackend, TrainedModel, World, WrapOptions
from lightrft.strategy.checkpoint.checkpoint_items import Models
from lightrft.strategy.fake_strategy import FakeBackend

# Some overridden methods are final: a type checker would find these saboteurs.
# mypy: disable-error-code="misc"


@saboteur("LIFE-1")
class StartsAgain(FakeStrategy):
    """Each call of setup_distributed starts a thread."""

    def setup_distributed(self, timeout: timedelta | None = None) -> None:
        super().setup_distributed(timeout)
        threading.Thread(target=time.sleep, args=(3,), daemon=True).start()


@saboteur("LIFE-2", world=2)
class EveryRankIsRank0(PlainStrategy):
    """is_rank_0 is True on every rank."""

    def is_rank_0(self) -> bool:
        return True


@saboteur("LIFE-2")
class SetsVariables(FakeBackend):
    """Sets RANK although it has no process group."""

    def __init__(self, config: StrategyConfig, world: World) -> None:
        super().__init__(config, world)
        os.environ["RANK"] = "0"


@saboteur("LIFE-2")
class KnowsTorchrunOnly(FakeBackend):
    """As one of several processes of mpirun or srun, it trains alone."""

    @classmethod
    @override
    def join(cls, config: StrategyConfig) -> World:
        return super().join(config) if "RANK" in os.environ else World.alone(config)


@saboteur("LIFE-3", world=2)
class NoTimeout(ReplicatedBackend):
    """The process group does not have the timeout of the settings."""

    @classmethod
    @override
    def join(cls, config: StrategyConfig) -> World:
        world = super().join(config.replace(timeout=3600.0))
        world.set_group_timeouts = lambda: None  # type: ignore[method-assign]
        return world


@saboteur("LIFE-3", world=2)
class ErrorOfTorch(PlainStrategy):
    """The error for a rank that died is that of torch.distributed."""

    @contextmanager
    @override
    def _running(self, call: str) -> Iterator[None]:
        yield


@saboteur("LIFE-3", world=2)
class WaitsInLaterUpdates(ReplicatedBackend):
    """From the fourth update on, an update waits for a lost rank without a timeout."""

    @override
    def backward(self, trained: TrainedModel, loss: torch.Tensor, *, retain_graph: bool) -> None:
        if trained.updates >= 3:
            for group in {self.world.device_group, self.world.cpu_group}:
                dist.distributed_c10d._set_pg_timeout(timedelta(hours=1), group)
        super().backward(trained, loss, retain_graph=retain_graph)


@saboteur("LIFE-4")
class ForgetsNumpy(FakeStrategy):
    """set_seed does not seed NumPy."""

    def set_seed(self, seed: int) -> None:
        random.seed(seed)
        torch.manual_seed(seed)


@saboteur("LIFE-4")
class OneSeed(FakeStrategy):
    """set_seed always seeds Python with 42."""

    def set_seed(self, seed: int) -> None:
        random.seed(42)
        np.random.seed(seed)
        torch.manual_seed(seed)


@saboteur("LIFE-5")
class LeavesVariable(FakeBackend):
    """close leaves an environment variable."""

    @override
    def close(self) -> None:
        os.environ["LEFT_BEHIND"] = "1"


@saboteur("LIFE-5")
class LeavesThread(FakeBackend):
    """Each strategy leaves a thread."""

    def __init__(self, config: StrategyConfig, world: World) -> None:
        super().__init__(config, world)
        threading.Thread(target=time.sleep, args=(30,), daemon=True).start()


@saboteur("LIFE-5")
class KeepsGroup(ReplicatedBackend):
    """A reference to the process group, and with it the group's threads, outlives close."""

    _groups: list[object] = []

    def __init__(self, config: StrategyConfig, world: World) -> None:
        super().__init__(config, world)
        self._groups.append(world.cpu_group)


@saboteur("LIFE-5")
class LeavesFile(FakeBackend):
    """Each strategy leaves an open file."""

    _files: list[BinaryIO] = []

    def __init__(self, config: StrategyConfig, world: World) -> None:
        super().__init__(config, world)
        self._files.append(tempfile.TemporaryFile())  # noqa: SIM115


@saboteur("LIFE-5")
class LeavesChild(FakeBackend):
    """Each strategy leaves a child process."""

    _children: list[subprocess.Popen[bytes]] = []

    def __init__(self, config: StrategyConfig, world: World) -> None:
        super().__init__(config, world)
        self._children.append(subprocess.Popen(["sleep", "30"]))


@saboteur("LIFE-5")
class KeepsChildProcess(FakeBackend):
    """The first update of the process starts a child process, which stays."""

    _helpers: list[subprocess.Popen[bytes]] = []

    @override
    def reduce(self, trained: TrainedModel) -> None:
        if not self._helpers:
            self._helpers.append(subprocess.Popen(["sleep", "30"]))


@saboteur("LIFE-5")
class SavesLeaveFiles(CheckpointHooks, FakeStrategy):
    """Each save leaves an open file."""

    _files: list[BinaryIO] = []

    @override
    def save(self, model: Models, directory: Path, tag: str | None, options: Options) -> Path:
        self._files.append(tempfile.TemporaryFile())  # noqa: SIM115
        return super().save(model, directory, tag, options)


@saboteur("LIFE-5")
class LoadsLeaveThreads(CheckpointHooks, FakeStrategy):
    """Each load leaves a thread."""

    @override
    def loaded(self, model: Models, options: Options) -> None:
        threading.Thread(target=time.sleep, args=(30,), daemon=True).start()


@saboteur("LIFE-11")
class LeavesHooks(FakeBackend):
    """A hook that was set when the model was prepared stays on it after close."""

    @override
    def wrap(self, module: nn.Module, options: WrapOptions) -> nn.Module:
        module.register_forward_pre_hook(lambda part, inputs: None)
        return super().wrap(module, options)


@saboteur("LIFE-11")
class HooksEachUpdate(FakeBackend):
    """Each update sets another gradient hook on the first parameter, and close removes them."""

    @override
    def reduce(self, trained: TrainedModel) -> None:
        self.__dict__.setdefault("_handles", []).append(trained.parameters[0].register_hook(lambda gradient: None))

    @override
    def close(self) -> None:
        for handle in self.__dict__.get("_handles", ()):
            handle.remove()
        super().close()


@saboteur("LIFE-5")
class ClosesOnce(FakeStrategy):
    """close raises when it is called twice."""

    _closes = 0

    def close(self) -> None:
        super().close()
        self._closes += 1
        if self._closes > 1:
            raise RuntimeError("closed already")

    def setup_distributed(self, timeout: timedelta | None = None) -> None:
        self._closes = 0
        super().setup_distributed(timeout)


@saboteur("LIFE-5", world=2)
class LeavesGroup(PlainStrategy):
    """close does not destroy the process group."""

    def close(self) -> None:
        self.world.close = lambda: None  # type: ignore[method-assign]
        super().close()


@saboteur("LIFE-6")
class EnvironmentOverridesLocalRank(FakeStrategy):
    """LOCAL_RANK of the environment overrides the setting local_rank."""

    @property
    def local_rank(self) -> int:
        return int(os.environ.get("LOCAL_RANK", "0"))


@saboteur("LIFE-7", world=2)
class RoundsDown(PlainStrategy):
    """A train_batch_size that does not divide is rounded down."""

    @property
    @override
    def accumulated_gradient(self) -> int:
        return max(1, self.config.train_batch_size // (self.config.micro_train_batch_size * self.world.size))


@saboteur("LIFE-7", world=2)
class ErrorWithoutNumbers(PlainStrategy):
    """The error for a train_batch_size that does not divide has no numbers."""

    @property
    @override
    def accumulated_gradient(self) -> int:
        try:
            return super().accumulated_gradient
        except ConfigError:
            raise ConfigError("train_batch_size is not right") from None


@saboteur("LIFE-8", world=2)
class DestroysCallersGroup(PlainStrategy):
    """close destroys a process group that the script made."""

    def close(self) -> None:
        super().close()
        if dist.is_initialized():
            dist.destroy_process_group()


@saboteur("LOG-1", world=2)
class PrintsOnEveryRank(PlainStrategy):
    """print prints on every rank."""

    def print(self, *message: object) -> None:
        print(*message)


@saboteur("LOG-1", world=2)
class LogsOnEveryRank(ReplicatedBackend):
    """The logger logs on every rank."""

    def __init__(self, config: StrategyConfig, world: World) -> None:
        super().__init__(config, world)
        logging.getLogger("lightrft").filters.clear()


@saboteur("LIFE-2", world=2)
class FirstOfEachHost(PlainStrategy):
    """is_rank_0 is True on the first process of every host."""

    def is_rank_0(self) -> bool:
        return self.local_rank == 0


@saboteur("LIFE-2", world=2)
class RankOfTheEnvironment(PlainStrategy):
    """get_rank reads RANK from the environment, not from the process group."""

    def get_rank(self) -> int:
        return int(os.environ.get("RANK", "0"))


@saboteur("LIFE-9")
class DefaultDtypeLeft(FakeBackend):
    """close leaves torch's default dtype at bfloat16."""

    @override
    def close(self) -> None:
        torch.set_default_dtype(torch.bfloat16)


@saboteur("LIFE-9")
class DrawsInAStep(FakeBackend):
    """Each update draws from torch's random stream."""

    @override
    def reduce(self, trained: TrainedModel) -> None:
        torch.rand(1)


@saboteur("LIFE-10")
class NeverSaves(FakeStrategy):
    """Leaving the block after SIGTERM saves nothing."""

    @contextmanager
    def saving_on_sigterm(self, save: Callable[[], object]) -> Iterator[None]:
        with super().saving_on_sigterm(lambda: None):
            yield


@saboteur("LIFE-10")
class SavesAfterErrors(FakeStrategy):
    """save is also called if the block raises."""

    @contextmanager
    def saving_on_sigterm(self, save: Callable[[], object]) -> Iterator[None]:
        try:
            with super().saving_on_sigterm(lambda: None):
                yield
        finally:
            if self.stop_requested:
                save()


@saboteur("LIFE-10")
class SavesAtOnce(StepHooks):
    """save is called inside optimizer_step, and again when the block is left."""

    @contextmanager
    def saving_on_sigterm(self, save: Callable[[], object]) -> Iterator[None]:
        self._save = save
        with super().saving_on_sigterm(save):
            yield

    @override
    def stepped(self, result: StepResult, scheduler: LRScheduler | None) -> None:
        if self.stop_requested:
            self._save()


@saboteur("LIFE-10")
class ExitsInAStep(StepHooks):
    """optimizer_step closes the strategy and exits after SIGTERM, as in version 0.1."""

    @override
    def stepped(self, result: StepResult, scheduler: LRScheduler | None) -> None:
        if self.stop_requested:
            self.close()
            raise SystemExit(0)


class _SeesSignals(FakeStrategy):
    """Knows that this rank got SIGTERM."""

    signalled = False

    @contextmanager
    def saving_on_sigterm(self, save: Callable[[], object]) -> Iterator[None]:
        with super().saving_on_sigterm(save):
            handler = signal.getsignal(signal.SIGTERM)
            assert callable(handler)

            def note(number: int, frame: FrameType | None) -> None:
                self.signalled = True
                handler(number, frame)

            signal.signal(signal.SIGTERM, note)
            yield


@saboteur("LIFE-10")
class StopsAtOnce(_SeesSignals):
    """stop_requested is True as soon as the signal arrives, also between the micro-batches of an update."""

    @property
    def stop_requested(self) -> bool:
        return self.signalled


@saboteur("LIFE-10")
class StopsWithGradientsPending(StepHooks, _SeesSignals):
    """stop_requested becomes True at any update, also while another model has a pending gradient."""

    updated = False

    @property
    def stop_requested(self) -> bool:
        return self.updated

    @override
    def stepped(self, result: StepResult, scheduler: LRScheduler | None) -> None:
        self.updated |= self.signalled and (result.applied or result.skipped)


@saboteur("LIFE-10")
class StopsAtAppliedUpdates(StepHooks):
    """A skipped update does not request a stop."""

    applied = False

    @property
    def stop_requested(self) -> bool:
        return self.applied and super().stop_requested

    @override
    def stepped(self, result: StepResult, scheduler: LRScheduler | None) -> None:
        self.applied |= result.applied


@saboteur("LIFE-10", world=2)
class StopsAlone(PlainStrategy):
    """Only rank 0 learns that a stop was requested."""

    @property
    def stop_requested(self) -> bool:
        return super().stop_requested and self.get_rank() == 0
