"""Defects of lifecycle and voice."""

import logging
import os
import random
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from typing_extensions import override

from lightrft.config import ConfigError
from lightrft.conformance.saboteurs.catalogue import saboteur
from lightrft.conformance.saboteurs.plain import PlainStrategy
from lightrft.strategy import FakeStrategy
from lightrft.strategy.distributed.world import World

# The methods overridden here are final on purpose: a saboteur is what no type checker would let pass.
# mypy: disable-error-code="misc"


@saboteur("LIFE-1")
class StartsAgain(FakeStrategy):
    """setup_distributed starts another thread each time."""

    def setup_distributed(self, timeout: timedelta | None = None) -> None:
        super().setup_distributed(timeout)
        threading.Thread(target=time.sleep, args=(3,), daemon=True).start()


@saboteur("LIFE-2", world=2)
class EverybodyFirst(PlainStrategy):
    """is_rank_0 is True on every rank."""

    def is_rank_0(self) -> bool:
        return True


@saboteur("LIFE-2")
class SetsVariables(FakeStrategy):
    """A strategy without process group sets RANK."""

    @override
    def _setup(self) -> None:
        os.environ["RANK"] = "0"


@saboteur("LIFE-3", world=2, verdict="hang")
class WaitsForEver(PlainStrategy):
    """The process group does not have the timeout."""

    @override
    def _join(self) -> World:
        world = World.join(self.config.replace(timeout=3600.0))
        world.impose_timeout = lambda: None  # type: ignore[method-assign]
        return world


@saboteur("LIFE-3", world=2)
class NamesNothing(PlainStrategy):
    """A lost peer is reported as the transport reports it."""

    @contextmanager
    @override
    def _running(self, call: str) -> Iterator[None]:
        yield


@saboteur("LIFE-4")
class ForgetsNumpy(FakeStrategy):
    """set_seed leaves NumPy's stream alone."""

    def set_seed(self, seed: int) -> None:
        random.seed(seed)
        torch.manual_seed(seed)


@saboteur("LIFE-4")
class OneSeed(FakeStrategy):
    """set_seed seeds Python with the same number always."""

    def set_seed(self, seed: int) -> None:
        random.seed(42)
        np.random.seed(seed)
        torch.manual_seed(seed)


@saboteur("LIFE-5")
class LeavesVariable(FakeStrategy):
    """close leaves an environment variable."""

    @override
    def _teardown(self) -> None:
        os.environ["LEFT_BEHIND"] = "1"


@saboteur("LIFE-5")
class LeavesThread(FakeStrategy):
    """Each lifetime leaves a thread."""

    @override
    def _setup(self) -> None:
        threading.Thread(target=time.sleep, args=(30,), daemon=True).start()


@saboteur("LIFE-5")
class LeavesFile(FakeStrategy):
    """Each lifetime leaves an open file."""

    _files: list[Any] = []

    @override
    def _setup(self) -> None:
        self._files.append(tempfile.TemporaryFile())  # noqa: SIM115


@saboteur("LIFE-5")
class LeavesChild(FakeStrategy):
    """Each lifetime leaves a child process."""

    _children: list[Any] = []

    @override
    def _setup(self) -> None:
        self._children.append(subprocess.Popen(["sleep", "30"]))


@saboteur("LIFE-5")
class ClosesOnce(FakeStrategy):
    """close cannot be called twice."""

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
    """close leaves the process group."""

    def close(self) -> None:
        self.world.close = lambda: None  # type: ignore[method-assign]
        super().close()


@saboteur("LIFE-6")
class ObeysTheEnvironment(FakeStrategy):
    """LOCAL_RANK of the environment wins over an explicit local_rank."""

    @property
    def local_rank(self) -> int:
        return int(os.environ.get("LOCAL_RANK", "0"))


@saboteur("LIFE-7", world=2)
class RoundsDown(PlainStrategy):
    """A batch that does not divide is cut."""

    @override
    def _window(self) -> int:
        return max(1, self.config.train_batch_size // (self.config.micro_train_batch_size * self.world.size))


@saboteur("LIFE-7", world=2)
class SaysLittle(PlainStrategy):
    """The error about the batch has no numbers."""

    @override
    def _window(self) -> int:
        try:
            return super()._window()
        except ConfigError:
            raise ConfigError("train_batch_size is not right") from None


@saboteur("LIFE-8", world=2)
class TakesOver(PlainStrategy):
    """close ends a process group that the script made."""

    def close(self) -> None:
        super().close()
        if dist.is_initialized():
            dist.destroy_process_group()


@saboteur("LOG-1", world=2)
class SpeaksTwice(PlainStrategy):
    """print speaks on every rank."""

    def print(self, *message: object) -> None:
        print(*message)


@saboteur("LOG-1", world=2)
class LogsTwice(PlainStrategy):
    """The logger speaks on every rank."""

    @override
    def _setup(self) -> None:
        logging.getLogger("lightrft").filters.clear()


@saboteur("LIFE-2", world=2)
class FirstOfEachHost(PlainStrategy):
    """The first process of every host is rank 0."""

    def is_rank_0(self) -> bool:
        return self.local_rank == 0


@saboteur("LIFE-2", world=2)
class RankOfTheEnvironment(PlainStrategy):
    """The rank is what the environment says now, not what the process group says."""

    def get_rank(self) -> int:
        return int(os.environ.get("RANK", "0"))
