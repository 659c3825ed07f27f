"""Beginning and ending, the ranks, and what they exchange."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import TracebackType
from typing import Any, Self, final

import numpy as np
import torch

from lightrft.config import ArgumentTypeError, ConfigError, StrategyConfig, StrategyError
from lightrft.strategy import log, memory
from lightrft.strategy.backend import Backend
from lightrft.strategy.checkpoint.checkpoints import Checkpoints
from lightrft.strategy.checkpoint.termination import Termination
from lightrft.strategy.distributed.collectives import Collectives, ReduceOp
from lightrft.strategy.distributed.operations import Operations, Watch
from lightrft.strategy.distributed.world import current_rank, local_rank
from lightrft.strategy.rollout.rollout import Rollout
from lightrft.strategy.settings_check import honourable
from lightrft.strategy.training.moving_average import MovingAverages
from lightrft.strategy.training.preparation import Preparation
from lightrft.strategy.training.prepared import PreparedModels


class Lifecycle(Backend):
    """A strategy's life, its place among the ranks, and their collectives."""

    def __init__(self, config: object = None, *, args: object = None, **settings: Any) -> None:
        """``config``, or ``args`` as LightRFT names it: a `StrategyConfig` or whatever its `from_args` takes.

        ``settings`` replace single ones. Without any, the settings have their defaults.
        """
        source = config if config is not None else args
        base = StrategyConfig(**settings) if source is None else StrategyConfig.from_args(source)
        chosen = base.replace(**settings) if source is not None and settings else base
        self.config = honourable(chosen, type(self))
        self._open = False
        self.setup_distributed()

    @final
    def setup_distributed(self, timeout: timedelta | None = None) -> None:
        """Join the other ranks. The constructor has done so; again changes nothing but, where given, the timeout.

        After `close` it begins a new lifetime.
        """
        if not self._open:
            self._begin()
        if timeout is not None and not (isinstance(timeout, timedelta) and timeout > timedelta(0)):
            raise ArgumentTypeError(f"setup_distributed: timeout={timeout!r}; allowed is a datetime.timedelta above 0")
        if timeout is not None and timeout != self.world.timeout:
            self.world.timeout = timeout
            self._operations.timeout = timeout.total_seconds()
            self.world.impose_timeout()

    def _begin(self) -> None:
        self.world = self._join()
        self._operations = Operations(self.world.rank, self.world.size, self.world.timeout.total_seconds())
        self._collectives = Collectives(self.world, self._operations)
        log.speak_as(self.world.rank)
        try:
            self._collectives.agree_on_all("get_strategy", self._shared_settings())
            with self.world.remembering_environment():
                self._setup()
            self._models = PreparedModels()
            self._preparation = Preparation(self, self._models, self._operations, self._collectives, self._window())
            self._averages = MovingAverages(self, self._collectives)
            self._checkpoints = Checkpoints(self, self._collectives, self._operations, self._averages)
            self._termination = Termination(self._collectives)
            self._rollout = Rollout(self.world, self._collectives, self.config)
            self.world.impose_timeout()
        except BaseException:
            self.world.close()
            raise
        self._watch = Watch(self._operations) if self.world.size > 1 and self.world.device.type == "cuda" else None
        self._open = True
        self.set_seed(self.config.seed)

    def _shared_settings(self) -> list[list[object]]:
        """The settings that must be alike on all ranks, as JSON values."""
        own = {name: value for name, value in self.config.to_dict().items() if name not in ("extra_args", "local_rank")}
        return [[name, list(it) if isinstance(it, tuple) else it] for name, it in own.items()]

    def _window(self) -> int:
        """K, the micro-batches of an update. Raises `ConfigError` on every rank where it is not whole."""
        total, micro, ranks = self.config.train_batch_size, self.config.micro_train_batch_size, self.world.size
        if total % (micro * ranks):
            raise ConfigError(
                f"train_batch_size={total} is not a multiple of micro_train_batch_size x ranks = {micro} x {ranks} = "
                f"{micro * ranks}; every rank must get the same whole number of micro-batches"
            )
        return total // (micro * ranks)

    @final
    def close(self) -> None:
        """Give back all that this strategy made: engine, process groups, threads, environment. May be called twice.

        Waits for a checkpoint that is being written, and raises, in the end, where that failed.
        """
        if not self._open:
            return
        self._open = False
        try:
            self._checkpoints.finish()
        finally:
            self._rollout.shutdown()
            self._models.clear()
            self._teardown()
            if self._watch is not None:
                self._watch.close()
            self.world.close()
            log.speak_as(current_rank())  # of another strategy in this process

    @final
    def __enter__(self) -> Self:
        self.setup_distributed()
        return self

    @final
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @contextmanager
    def _running(self, call: str) -> Iterator[None]:
        """The body is the public method ``call``: named in errors of lost peers, refused after `close`."""
        if not self._open:
            raise StrategyError(f"{call}: this strategy was closed; setup_distributed begins a new lifetime")
        with self._operations.running(call):
            yield

    # Place

    @property
    def args(self) -> Any:
        """The object that the settings were read from, as the script passed it."""
        return self.config.args

    @property
    def world_size(self) -> int:
        """Number of ranks; 1 without a process group."""
        return self.world.size

    @property
    def local_rank(self) -> int:
        """Index of this process's device on its host: the setting, else LOCAL_RANK of the environment, else 0."""
        return local_rank(self.config)

    @property
    def device(self) -> torch.device:
        """Where prepared models live, and where their inputs belong."""
        return self.world.device

    @property
    def accumulated_gradient(self) -> int:
        """K: the micro-batches of one update on one rank."""
        return self._window()

    @final
    def get_rank(self) -> int:
        """This process's rank; 0 without a process group."""
        return self.world.rank

    @final
    def is_rank_0(self) -> bool:
        """Whether this is the rank that speaks."""
        return self.world.rank == 0

    @final
    def print(self, *message: object) -> None:
        """Print with the time, on rank 0 only."""
        log.say(*message)

    @final
    def set_seed(self, seed: int) -> None:
        """Seed Python's, NumPy's and torch's random streams, CUDA's included, alike on every rank."""
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)

    @final
    def report_memory(self, prefix: str = "") -> memory.MemoryReport:
        """Measure this process's memory, and say it on rank 0. Bytes."""
        report = memory.measure(self.world.device)
        log.say(f"MEMORY {prefix}: {report}")
        return report

    @final
    def sync_and_clear_cache(self) -> None:
        """Wait for the device and for every rank, and give cached device memory back."""
        with self._running("sync_and_clear_cache"):
            if self.world.device.type == "cuda":
                torch.cuda.synchronize(self.world.device)
            self._collectives.barrier()
            if self.world.device.type == "cuda":
                torch.cuda.empty_cache()

    # Collectives

    @final
    def all_reduce(self, data: Any, op: ReduceOp = "mean") -> Any:
        """Reduce a tensor, a number, or nested dicts of these over all ranks; what comes back is new.

        ``op`` is "mean", "sum" or "max". Keys, shapes, dtypes and devices come back as they went in; bf16 and
        fp16 are reduced in fp32, integers exactly, numbers in 64 bits, and the mean of an int is a float.

        Raises on every rank: `ArgumentTypeError` for the mean of an integer tensor, `ArgumentError` for an
        unknown ``op``, `StrategyError` where the ranks pass different keys, dtypes or shapes.
        """
        with self._running("all_reduce"):
            return self._collectives.all_reduce(data, op)

    @final
    def all_gather(self, data: Any) -> Any:
        """Concatenate a tensor, a number, or nested dicts of these over all ranks along dim 0, in rank order.

        Ranks may differ in dim 0, 0 rows included, and in nothing else. Numbers and 0-dim tensors give a 1-D
        tensor of one element a rank. Raises like `all_reduce`.
        """
        with self._running("all_gather"):
            return self._collectives.all_gather(data)
