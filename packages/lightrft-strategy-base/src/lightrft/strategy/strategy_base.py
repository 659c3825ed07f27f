"""`StrategyBase`: the one API over every training backend and every rollout engine.

A thin facade: every public method checks its call and delegates to a part. What differs between training backends is in
`lightrft.strategy.backend`, one update in `lightrft.strategy.step.update`, checkpoints in
`lightrft.strategy.checkpoint`, and rollouts in `lightrft.strategy.rollout`.
"""

import atexit
import os
import random
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from functools import partial
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Literal, Self, TypeVar, final, overload

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Sampler

from lightrft.config import (
    ArgumentTypeError,
    ConfigError,
    LightRFTError,
    StrategyConfig,
    StrategyError,
)
from lightrft.config.validation import shown
from lightrft.strategy import supported_settings
from lightrft.strategy.arguments import (
    COUNT,
    DTYPE,
    FLAG,
    FLAG_OR_NONE,
    FUNCTION,
    INDEX,
    LIST,
    MODULE,
    NUMBER,
    OPTIMIZER,
    PATH,
    SEED,
    SIZE,
    Expected,
    check_processor,
    device_of,
    refusal,
)
from lightrft.strategy.backend.contract import Backend
from lightrft.strategy.backend.replicated import ReplicatedBackend
from lightrft.strategy.backend.types import TrainedModel, WrapOptions
from lightrft.strategy.checkpoint.checkpoint_items import Models, RunState
from lightrft.strategy.checkpoint.compatibility import LoadOptions
from lightrft.strategy.checkpoint.load_checkpoint import load_checkpoint
from lightrft.strategy.checkpoint.save_checkpoint import CheckpointSaver
from lightrft.strategy.compat import LightRFTMembers
from lightrft.strategy.data import planning
from lightrft.strategy.data.loaders import ResumableLoader, make_loader
from lightrft.strategy.data.micro_batches import MicroBatch
from lightrft.strategy.distributed.collectives import Collectives, ReduceOp
from lightrft.strategy.distributed.operations import Operations, TimeoutReporter
from lightrft.strategy.distributed.rank_consensus import RankConsensus
from lightrft.strategy.distributed.stop_request import StopRequest
from lightrft.strategy.distributed.world import World, current_rank, local_rank
from lightrft.strategy.export import load_model, save_model
from lightrft.strategy.export.load_model import LoadedNames
from lightrft.strategy.log_probs import LogProbs
from lightrft.strategy.models import token_log_probs
from lightrft.strategy.models.meta import weights_on_rank_0
from lightrft.strategy.models.optimizers import check_kinds
from lightrft.strategy.models.prepare import Preparation
from lightrft.strategy.models.registry import ModelRegistry
from lightrft.strategy.moved_hooks import check_moved_hooks, current_capabilities
from lightrft.strategy.parallel.sequence import SequenceDataProcessor, SequenceParallel
from lightrft.strategy.rollout.engine import Completion, RolloutEngine
from lightrft.strategy.rollout.multimodal import InputsBuilder, multimodal_inputs
from lightrft.strategy.rollout.rollout import EngineStatus, Rollout
from lightrft.strategy.step import update
from lightrft.strategy.step.moving_average import MovingAverages
from lightrft.strategy.step.result import StepResult
from lightrft.strategy.step.schedules import cosine_schedule
from lightrft.strategy.storage.files import user_path
from lightrft.strategy.telemetry import log, memory
from lightrft.strategy.telemetry.tracking import Tracking

T = TypeVar("T")
T1 = TypeVar("T1")
T2 = TypeVar("T2")
T3 = TypeVar("T3")
T4 = TypeVar("T4")
Key = TypeVar("Key")

DEFAULT_MAX_STEPS = int(1e8)
"""Number of updates over which a schedule decays if the caller does not give one."""
_PER_RANK_SETTINGS = frozenset({"extra_args", "local_rank", "log_dir", "log_name", "log_project"})
"""Settings that may differ between ranks. Only rank 0 uses those of trackers, which often contain the time."""
_OPEN: "weakref.WeakSet[StrategyBase]" = weakref.WeakSet()
"""The strategies that are not closed."""


def open_strategies() -> "list[StrategyBase]":
    """Return the strategies of this process that are not closed."""
    return list(_OPEN)


os.register_at_fork(after_in_child=_OPEN.clear)  # they belong to the parent: a child must not destroy their groups


@atexit.register
def _end_process_groups_of_open_strategies() -> None:
    """Called at interpreter exit, for scripts that do not close a strategy. Leaves the engine, which ends by itself."""
    for strategy in open_strategies():
        strategy._tracking.close()
        strategy._end_process_groups()


class StrategyBase(LightRFTMembers):
    """Trains models and generates from them, on one process or many, with the same behaviour on every backend.

    The constructor sets up torch.distributed, and `close` frees everything; a strategy is also a context manager. Every
    rank makes the same calls in the same order, unless a method says otherwise. Errors name the call: `ConfigError` for
    settings, `ArgumentError` and `StrategyError` for invalid usage, `StrategyError` for ranks that died, `EngineError` for
    rollouts.

    A subclass names itself and its backend::

        class MyStrategy(StrategyBase):
            name = "mine"
            backend_class = MyBackend
    """

    sequence_parallel: SequenceParallel
    """The ranks that share the sequences of this rank; splits batches, and gathers per-token values."""
    sp_data_processor: SequenceDataProcessor
    """Gathers lists of samples over these ranks, and splits them again. The name is LightRFT's."""
    name: ClassVar[str]
    """The name under which the strategy is registered."""
    backend_class: ClassVar[type[ReplicatedBackend]] = ReplicatedBackend
    """The class that `make_backend` instantiates; its `join` finds the other ranks."""
    supported_settings: ClassVar[frozenset[str]] = frozenset()
    """The optional settings that this strategy supports; see `lightrft.strategy.supported_settings`."""
    _build_multimodal_inputs: InputsBuilder = staticmethod(multimodal_inputs)
    """A script may replace it on a strategy, to pass audio to the engine for example, as LightRFT's scripts do."""

    def __init_subclass__(cls, **arguments: object) -> None:
        super().__init_subclass__(**arguments)
        check_moved_hooks(cls)

    def __init__(self, config: object = None, *, args: object = None, **settings: Any) -> None:
        """Set up torch.distributed and create the backend. All ranks must call this.

        Args:
            config: A `StrategyConfig`, or anything that `StrategyConfig.from_args` accepts. Default: all defaults.
            args: The same, under LightRFT's name for it.
            **settings: Individual settings that override those of ``config``.

        Raises:
            ConfigError: A setting is invalid, is not supported by this strategy, or differs between ranks.
        """
        source = config if config is not None else args
        base = StrategyConfig(**settings) if source is None else StrategyConfig.from_args(source)
        chosen = base.replace(**settings) if source is not None and settings else base
        self.config = supported_settings.validate(chosen, self.name, self.supported_settings)
        self._open = False
        self.setup_distributed()
        supported_settings.warn_of_unknown_names(self.config)

    def make_backend(self, config: StrategyConfig, world: World) -> Backend:
        """Create the backend; a subclass may choose among several. `close` restores environment variables set here."""
        return self.backend_class(config, world)

    # Lifecycle

    @final
    def setup_distributed(self, timeout: timedelta | None = None) -> None:
        """Set up torch.distributed, or use the process group of the caller. All ranks must call this.

        The constructor calls this; another call only sets the timeout. After `close`, it reopens the strategy.

        Args:
            timeout: How long a collective waits for another rank. Default: the setting ``timeout``.

        Raises:
            ArgumentTypeError: ``timeout`` is not a positive timedelta.
        """
        if not self._open:
            self._begin()
        if timeout is not None and not (isinstance(timeout, timedelta) and timeout > timedelta(0)):
            raise ArgumentTypeError(
                f"setup_distributed: expected timeout to be a datetime.timedelta above 0, got {shown(timeout)}. "
                f"Pass for example timedelta(minutes=30)"
            )
        if timeout is not None and timeout != self.world.timeout:
            self.world.timeout = timeout
            self._operations.timeout = timeout.total_seconds()
            self.world.set_group_timeouts()

    def _begin(self) -> None:
        self.world = world = self.backend_class.join(self.config)
        self._operations = operations = Operations(world.rank, world.size, world.timeout.total_seconds())
        self._consensus = consensus = RankConsensus(world)
        self._collectives = Collectives(world, consensus)
        log.set_rank(world.rank)
        with ExitStack() as on_failure:
            on_failure.callback(world.close)
            consensus.agree_by_digest("get_strategy", _shared_settings(self.config))
            with world.remembering_environment():
                self.backend = backend = self.make_backend(self.config, world)
            on_failure.callback(backend.close)
            self.config = backend.config
            self.sequence_parallel = SequenceParallel(world, operations, consensus, backend.config.sp_size)
            self.sp_data_processor = SequenceDataProcessor(self.sequence_parallel)
            self._models = ModelRegistry()
            self._preparation = Preparation(
                backend, self._models, operations, consensus, self.sequence_parallel, self.accumulated_gradient
            )
            self._averages = MovingAverages(backend, consensus)
            self._run_state = RunState(self.name, backend, self._models, self._preparation, consensus, self._averages)
            self._checkpoint_saver = CheckpointSaver(self._run_state, operations)
            self._stop = StopRequest(consensus)
            self._rollout = Rollout(world, consensus, self.sequence_parallel, backend.config)
            with consensus.together("get_strategy", "loading trackers"):
                self._tracking = Tracking.begin(self.config, self.name, world.rank, world.size, world.device)
            recorder = self._tracking.recorder
            operations.timer = None if recorder is None else recorder.phases
            world.set_group_timeouts()
            on_failure.pop_all()
        self._timeout_reporter = TimeoutReporter(operations) if world.size > 1 and world.device.type == "cuda" else None
        self._open = True
        _OPEN.add(self)
        self.set_seed(self.config.seed)

    @final
    def close(self) -> None:
        """Free the engine, process groups and threads of this strategy, and restore the environment. Idempotent.

        Waits for a checkpoint that is being written and, for half a minute at most, for each tracker. All ranks must
        call this.

        Raises:
            CheckpointError: Writing that checkpoint failed; everything is still freed.
        """
        if not self._open:
            return
        self._open = False
        _OPEN.discard(self)
        with ExitStack() as freeing:  # in reverse order; an error or an interruption in one does not skip the others
            freeing.callback(lambda: log.set_rank(current_rank()))  # the rank of another strategy in this process
            if self._timeout_reporter is not None:
                freeing.callback(self._timeout_reporter.close)
            freeing.callback(self._end_process_groups)
            freeing.callback(self._models.clear)
            freeing.callback(self._rollout.shutdown)
            freeing.callback(self._tracking.close)
            self._checkpoint_saver.finish()

    def _end_process_groups(self) -> None:
        """Destroy the process groups of this strategy, and drop every reference to them; see `World.close`."""
        self.backend.close()
        self._checkpoint_saver.release_group()
        self._rollout.release_groups()
        self.sequence_parallel.release_group()
        self.world.close()

    @final
    def __enter__(self) -> Self:
        self.setup_distributed()
        return self

    @final
    def __exit__(
        self, error_class: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @contextmanager
    def _running(self, call: str) -> Iterator[None]:
        """Run the public method ``call``: errors about ranks that died name it, and a closed strategy refuses it."""
        if not self._open:
            raise StrategyError(
                f"{call}: expected an open strategy, got one that was closed. Call setup_distributed first"
            )
        with self._operations.running(call):
            yield

    def _check_on_all(self, call: str, **arguments: tuple[object, Expected]) -> None:
        """Check the arguments of a call that all ranks make, and raise on every rank if one is wrong on any."""
        with self._consensus.together(call, "checking arguments"):
            _check(call, **arguments)

    # This process and its rank

    @property
    def args(self) -> Any:
        """The object that the settings were read from, as the script passed it."""
        return self.config.args

    @property
    def capabilities(self) -> frozenset[str]:
        """Optional features that the backend supports, such as "rank_dependent_modules"."""
        return current_capabilities(self.backend, self.backend.capabilities)

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
        """The device of prepared models and of their inputs."""
        return self.world.device

    @property
    def accumulated_gradient(self) -> int:
        """K: gradient accumulation steps, the micro-batches of one update on one rank. LightRFT's name.

        Raises:
            ConfigError: On every rank, if ``train_batch_size`` is not a multiple of ``micro_train_batch_size`` times the
                number of ranks; those that share sequences count as one.
        """
        total, micro, ranks = self.config.train_batch_size, self.config.micro_train_batch_size, self.world.size
        sharing = self.sequence_parallel.size
        ranks, counted = ranks // sharing, "ranks" if sharing == 1 else f"(ranks / sp_size={sharing})"
        if total % (micro * ranks):
            raise ConfigError(
                f"train_batch_size={total} is not a multiple of micro_train_batch_size x {counted} = {micro} x {ranks} = "
                f"{micro * ranks}; every rank must get the same number of micro-batches. Change one of the two batch sizes"
            )
        return total // (micro * ranks)

    @final
    def get_rank(self) -> int:
        """Return this process's rank; 0 without a process group."""
        return self.world.rank

    @final
    def is_rank_0(self) -> bool:
        """Return whether this is rank 0, which prints and logs."""
        return self.world.rank == 0

    @final
    def print(self, *message: object) -> None:
        """Print with the time, on rank 0 only. Any rank may call this."""
        log.print_on_rank_0(*message)

    @final
    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Write metrics, and those that the strategy collected, to the trackers of the run. Any rank may call this.

        Rank 0 writes its own values and waits for no other rank: reduce them with `all_reduce` first. It appends to
        ``metrics.jsonl`` in ``log_dir``, and passes them to ``trackers`` in the background. The strategy's own metrics
        are, among others, "model/loss", "model/grad_norm", "seconds/backward" and "rollout/staleness"; docs/trackers.md
        lists them. A metric of yours replaces one of the same name. A tracker that fails is reported once; training
        continues.

        Args:
            metrics: By name: numbers, tensors of one number, or nested dicts of these, whose names are joined with "/".
                May be empty. NaN and infinity are allowed. Tensors on the device cost one synchronisation, on rank 0.
            step: At least 0, for example the number of updates so far. It may repeat.

        Raises:
            ArgumentError, ArgumentTypeError: On every rank that passes them, for a value that is not a number, a name
                that occurs twice or is "step" or "time", or an invalid ``step``.
        """
        with self._running("log"):
            self._tracking.log(metrics, step, self.is_rank_0())

    @final
    def set_seed(self, seed: int) -> None:
        """Seed the random number generators of Python, NumPy and torch, CUDA included. Any rank may call this.

        Raises:
            ArgumentError, ArgumentTypeError: ``seed`` is not an integer of at least 0 and below 2**32.
        """
        _check("set_seed", seed=(seed, SEED))
        seed = int(seed)
        random.seed(seed)
        np.random.seed(seed)
        if torch.accelerator.current_accelerator() is None:  # torch.manual_seed would record a stack per kind of device
            torch.default_generator.manual_seed(seed)
        else:
            torch.manual_seed(seed)

    @final
    def report_memory(self, prefix: str = "") -> memory.MemoryReport:
        """Measure this process's memory, in bytes, and print the report on rank 0. Any rank may call this."""
        report = memory.measure(self.world.device)
        log.print_on_rank_0(f"MEMORY {prefix}: {report}")
        return report

    @final
    def sync_and_clear_cache(self) -> None:
        """Wait for the device and for every rank, and free cached device memory. All ranks must call this."""
        with self._running("sync_and_clear_cache"):
            if self.world.device.type == "cuda":
                torch.cuda.synchronize(self.world.device)
            self._consensus.barrier()
            if self.world.device.type == "cuda":
                torch.cuda.empty_cache()

    # Collectives

    @overload
    def all_reduce(self, data: torch.Tensor, op: ReduceOp = ...) -> torch.Tensor: ...
    @overload
    def all_reduce(self, data: int, op: Literal["sum", "max"]) -> int: ...
    @overload
    def all_reduce(self, data: float, op: ReduceOp = ...) -> float: ...
    @overload
    def all_reduce(self, data: Mapping[Key, Any], op: ReduceOp = ...) -> dict[Key, Any]: ...
    @final
    def all_reduce(self, data: object, op: ReduceOp = "mean") -> Any:
        """Reduce a tensor, a number, or nested dicts of these over all ranks. All ranks must call this.

        bf16 and fp16 are reduced in fp32, integers exactly, numbers in 64 bits; the mean of an int is a float.

        Args:
            data: Tensors of any shape, numbers, or nested dicts of these; the same structure on every rank.
            op: "mean", "sum" or "max".

        Returns:
            New values with the keys, shapes, dtypes and devices of ``data``.

        Raises:
            ArgumentTypeError: On every rank, for the mean of an integer tensor.
            ArgumentError: On every rank, for an unknown ``op``.
            StrategyError: On every rank, if the ranks pass different keys, dtypes or shapes.
        """
        with self._running("all_reduce"):
            return self._collectives.all_reduce(data, op)

    @overload
    def all_gather(self, data: torch.Tensor | float) -> torch.Tensor: ...
    @overload
    def all_gather(self, data: Mapping[Key, Any]) -> dict[Key, Any]: ...
    @final
    def all_gather(self, data: object) -> Any:
        """Concatenate a tensor, a number, or nested dicts of these over all ranks. All ranks must call this.

        Args:
            data: Tensors (rows, ...), which may differ between ranks in their number of rows only, 0 included; numbers
                and 0-dim tensors count as one row.

        Returns:
            Tensors (sum of rows, ...) in rank order, in the structure of ``data``.

        Raises:
            ArgumentError, ArgumentTypeError, StrategyError: On every rank, as in `all_reduce`.
        """
        with self._running("all_gather"):
            return self._collectives.all_gather(data)

    # Preparing

    @contextmanager
    def init_model_context(self, meta_init: bool = False) -> Iterator[None]:
        """Build models in this context, or load them with ``from_pretrained``. All ranks must enter it.

        Args:
            meta_init: Allocate and load weights on rank 0 only; `prepare` distributes them.

        Raises:
            StrategyError: With ``meta_init``, on every rank, if building a model failed on some rank, for example
                because its constructor reads values of tensors.
        """
        with self._running("init_model_context"):
            self._check_on_all("init_model_context", meta_init=(meta_init, FLAG))
        if not meta_init:
            yield
            return
        with self._consensus.together("init_model_context"), weights_on_rank_0(self.world.rank):
            yield

    @final
    def create_optimizer(self, model: nn.Module, **settings: object) -> Optimizer:
        """Create AdamW over the trainable parameters; biases and norms are excluded from ``weight_decay``.

        All ranks must call this.

        Args:
            model: A model that will be passed to `prepare` with the optimizer, or one that `prepare_model` returned.
            **settings: Arguments of ``torch.optim.AdamW``, such as ``lr`` and ``betas``. ``weight_decay`` is 0 by default.

        Raises:
            StrategyError: The model already has an optimizer, or was prepared for inference.
            ArgumentError, ArgumentTypeError: A setting is unknown or invalid.
        """
        with self._running("create_optimizer"):
            with self._consensus.together("create_optimizer", "checking arguments"):
                check_kinds("create_optimizer", model)
                _check("create_optimizer", weight_decay=(settings.get("weight_decay", 0.0), NUMBER))
            return self._preparation.create_optimizer(model, settings)

    @overload
    def prepare(self, model: T, /, *, is_rlhf: bool = ...) -> T: ...
    @overload
    def prepare(self, first: T1, second: T2, /, *, is_rlhf: bool = ...) -> tuple[T1, T2]: ...
    @overload
    def prepare(self, first: T1, second: T2, third: T3, /, *, is_rlhf: bool = ...) -> tuple[T1, T2, T3]: ...
    @overload
    def prepare(
        self, first: T1, second: T2, third: T3, fourth: T4, /, *, is_rlhf: bool = ...
    ) -> tuple[T1, T2, T3, T4]: ...
    @overload
    def prepare(self, *models: object, is_rlhf: bool = ...) -> tuple[Any, ...]: ...
    @final
    def prepare(self, *models: object, is_rlhf: bool = False) -> Any:
        """Prepare models, for training or for inference. All ranks must call this.

        Args:
            *models: Each is a model, for inference; ``(model, optimizer, scheduler)``, for training; a list of models;
                or None.
            is_rlhf: Has no effect; accepted because LightRFT's scripts pass it.

        Returns:
            The arguments, each in its original structure; a single argument is returned without a tuple around it. A
            model may be wrapped. The optimizer and the scheduler are the caller's own objects.

        Raises:
            StrategyError: On every rank, for a model that is already prepared, or shares parameters with a prepared one.
            UnsupportedOperationError: On every rank, for a model that this strategy does not support.
        """
        with self._running("prepare"):
            with self._consensus.together("prepare", "checking arguments"):
                self._preparation.check("prepare", models)
            results = [self._preparation.prepare(model) for model in models]
            return results[0] if len(results) == 1 else tuple(results)

    @final
    def prepare_model(
        self, model: T, is_training: bool = False, shard_size: int = -1, reshard_after_forward: bool = True
    ) -> T:
        """Prepare one model before its optimizer is created. All ranks must call this.

        Args:
            model: The model; anything that is not a module is returned unchanged.
            is_training: Whether `create_optimizer` will be called for it.
            shard_size: Number of ranks that share one copy of the parameters; groups of this size are replicas. -1 uses
                the setting.
            reshard_after_forward: Whether gathered parameters are freed between forward and backward.

        Returns:
            The model, possibly wrapped.

        Raises:
            ConfigError: ``shard_size`` does not divide the number of ranks.
            StrategyError: On every rank, for a model that is already prepared, or shares parameters with a prepared one.
            UnsupportedOperationError: On every rank, for a model that this strategy does not support.
        """
        if not isinstance(model, nn.Module):
            return model
        flags = {"is_training": (is_training, FLAG), "reshard_after_forward": (reshard_after_forward, FLAG)}
        options = WrapOptions(training=is_training, shard_size=shard_size, reshard_after_forward=reshard_after_forward)
        with self._running("prepare_model"):
            with self._consensus.together("prepare_model", "checking arguments"):
                _check("prepare_model", **flags)
                if (
                    isinstance(shard_size, bool)
                    or not isinstance(shard_size, int)
                    or not (shard_size == -1 or shard_size > 0)
                ):
                    raise ConfigError(
                        f"prepare_model: expected shard_size to be a number of ranks, or -1 for the setting, got "
                        f"{shown(shard_size)}. Pass -1, or a divisor of the number of ranks"
                    )
            wrapped: Any = self._preparation.model(model, options)
            return wrapped  # type: ignore[no-any-return]

    @final
    def prepare_models_and_optimizers(
        self, actor: nn.Module, critic: nn.Module | None, reward_models: object, initial_model: nn.Module | None, args: object,
        max_steps: int,
    ) -> tuple[tuple[Any, Any, Any], tuple[Any, Any, Any], Any, Any]:  # fmt: skip
        """Prepare the models of RLHF: actor and critic with AdamW and a cosine schedule, the others for inference.

        All ranks must call this.

        Args:
            actor: The model to train.
            critic: The critic, or None. It is trained if ``critic_pretrain`` is set, else prepared for inference.
            reward_models: One or several, for inference; returned unchanged if ``remote_rm_url`` is set.
            initial_model: The reference model, for inference.
            args: Learning rates, betas, weight decay and warm-up that override this strategy's settings.
            max_steps: Number of updates over which the schedules decay.

        Returns:
            ``((actor, optimizer, scheduler), (critic, optimizer, scheduler), reward_models, initial_model)``; entries
            that do not apply are None.

        Raises:
            ArgumentError: ``max_steps`` is not a positive integer.
            StrategyError: As for `create_optimizer` and `prepare`.
        """
        call = "prepare_models_and_optimizers"
        with self._running(call), self._consensus.together(call, "checking arguments"):
            config = self._config_of(args, call)
            _check(call, max_steps=(max_steps, COUNT))
            check_kinds(call, actor)
            self._preparation.check(call, [critic, initial_model, None if config.remote_rm_url else reward_models])
        actor.is_actor = True  # type: ignore[assignment]  # by which LightRFT's trainers recognise it
        trained_actor = self._with_optimizer(actor, config, config.actor_learning_rate, max_steps)
        trained_critic: tuple[Any, Any, Any] = (None, None, None)
        if critic is not None and config.critic_pretrain:
            trained_critic = self._with_optimizer(critic, config, config.critic_learning_rate, max_steps)
        elif critic is not None:
            trained_critic = (self.prepare(critic), None, None)
        rewards = reward_models if config.remote_rm_url else self.prepare(reward_models)
        return trained_actor, trained_critic, rewards, self.prepare(initial_model)

    @final
    def prepare_reward_model(
        self, reward_model: nn.Module, args: object = None, max_steps: int = DEFAULT_MAX_STEPS
    ) -> tuple[Any, Any, Any]:
        """Prepare a reward model for training, with the actor's learning rate. All ranks must call this.

        Args:
            reward_model: The model.
            args: Learning rates, betas, weight decay and warm-up that override this strategy's settings.
            max_steps: Number of updates over which the schedule decays.

        Returns:
            ``(model, optimizer, scheduler)``.

        Raises:
            StrategyError: As for `create_optimizer` and `prepare`.
        """
        call = "prepare_reward_model"
        with self._running(call), self._consensus.together(call, "checking arguments"):
            config = self._config_of(args, call)
            check_kinds(call, reward_model)
            _check(call, max_steps=(max_steps, COUNT))
        return self._with_optimizer(reward_model, config, config.actor_learning_rate, max_steps)

    def _with_optimizer(
        self, model: nn.Module, config: StrategyConfig, rate: float, max_steps: int
    ) -> tuple[Any, Any, Any]:
        optimizer = self.create_optimizer(model, lr=rate, betas=config.adam_betas, weight_decay=config.l2)
        return self.prepare((model, optimizer, cosine_schedule(optimizer, config.lr_warmup_ratio, max_steps)))

    def _config_of(self, args: object, call: str) -> StrategyConfig:
        try:
            return self.config if args is None or args is self.args else self.config.overlaid(args)
        except ConfigError as error:
            raise ConfigError(f"{call}: args: {error}") from error

    @final
    def unwrap_model(self, model: nn.Module) -> nn.Module:
        """Return the original model, without the wrappers of the actor and the backend. Idempotent. Any rank may call this."""
        _check("unwrap_model", model=(model, MODULE))
        return self._models.unwrap(model)

    @final
    def setup_dataloader(
        self, replay_buffer: object, batch_size: int, pin_memory: bool = False, shuffle: bool = True,
        collate_fn: Callable[[list[Any]], Any] | None = None, drop_last: bool = True, sampler: Sampler[int] | None = None,
        consumed_samples: int = 0, whole_updates: bool | None = None,
    ) -> DataLoader[Any]:  # fmt: skip
        """Return a loader over this rank's share of a map-style dataset. All ranks must call this.

        Ranks that share sequences (``sp_size``) get the same samples, and count as one rank below.

        The order depends only on the seed and the epoch (``loader.set_epoch``). While the loader exists, every
        checkpoint stores its position. Loaders are matched by the order in which they were created: the n-th loader of
        a resumed run gets the position of the n-th loader, whether it is created before or after `load_ckpt`.

        A training loader ends each epoch with a whole update, so that the updates are the same on any number of ranks:
        see ``whole_updates``.

        Args:
            replay_buffer: The dataset.
            batch_size: Samples per batch on this rank.
            pin_memory: Copy batches to pinned memory; has no effect without CUDA.
            shuffle: Shuffle each epoch.
            collate_fn: Turns a list of samples into a batch.
            drop_last: Drop samples that do not fill the last batch on every rank, or with ``whole_updates`` the last
                update. If False, samples are repeated instead: fewer than there are ranks, so that each rank gets the same
                number, or with ``whole_updates`` as many as fill the last update.
            sampler: The caller's own sampler; checkpoints do not store its position.
            consumed_samples: Number of samples of the epoch to skip, over all ranks.
            whole_updates: Make each epoch a multiple of ``train_batch_size`` samples. If an epoch resumes within an
                update, its remaining samples are cut or filled to a multiple. ``batch_size`` must be
                ``micro_train_batch_size``, or divide a rank's share of an update; the script then passes ``boundary``
                to each `optimizer_step`, which otherwise counts batches of any size as micro-batches. Default: yes,
                with ``drop_last``, for a training loader, which means here: it shuffles, its ``batch_size`` is
                ``micro_train_batch_size``, and the dataset has at least ``train_batch_size`` samples. A warning says
                how many samples of each epoch such a loader drops, or that its updates depend on the number of ranks,
                if it has too few samples or no ``drop_last``.

        Returns:
            A `ResumableLoader`; a plain ``DataLoader`` if ``sampler`` is given.

        Raises:
            ArgumentError: The dataset has no length, a position is out of range, or batches cannot add up to whole updates.
            CheckpointError: A loaded checkpoint has the position of a different loader.
        """
        _check(
            "setup_dataloader", batch_size=(batch_size, COUNT), pin_memory=(pin_memory, FLAG), shuffle=(shuffle, FLAG),
            collate_fn=(collate_fn, FUNCTION), drop_last=(drop_last, FLAG), consumed_samples=(consumed_samples, INDEX),
            whole_updates=(whole_updates, FLAG_OR_NONE),
        )  # fmt: skip
        loader = make_loader(
            replay_buffer, int(batch_size), rank=self.sequence_parallel.data_rank, ranks=self.sequence_parallel.data_ranks,
            seed=self.config.seed, shuffle=shuffle, drop_last=drop_last, sampler=sampler,
            consumed_samples=int(consumed_samples), collate_fn=collate_fn,
            pin_memory=pin_memory and self.world.device.type == "cuda", whole_updates=whole_updates,
            total=self.config.train_batch_size, micro=self.config.micro_train_batch_size,
        )  # fmt: skip
        if isinstance(loader, ResumableLoader):
            self._run_state.loaders.add(loader)
        return loader

    @final
    def plan_micro_batches(
        self, lengths: Sequence[int] | np.ndarray | torch.Tensor, *, max_tokens: int, padded: bool
    ) -> tuple[MicroBatch, ...]:
        """Return this rank's sequences as micro-batches within a token budget, the same number on every rank.

        Ranks may have different sequences, and different numbers of them. Each rank makes as many micro-batches as the rank
        that needs the most, the costly ones first, and divides its sequences as evenly as the budget allows. The plan depends
        only on the arguments of all ranks. All ranks must call this.

        A rank with fewer sequences than micro-batches gets fillers, with ``weight`` 0 and no ``indices``. Forward and
        backward passes of a sharded model wait for every rank, so a filler needs them too: pass any short sequence, and
        multiply its loss and denominator by 0. One update, of micro-batches that are packed or padded by ``collate``::

            for micro_batch in strategy.plan_micro_batches(lengths, max_tokens=8192, padded=True):
                batch = collate([sequences[index] for index in micro_batch.indices] or [shortest])
                losses, tokens = losses_of(model, batch)  # a sum over tokens, and their number
                weight = micro_batch.weight
                strategy.backward(weight * losses, model, optimizer, denominator=weight * tokens)
                strategy.optimizer_step(optimizer, model, boundary=micro_batch.last)

        Args:
            lengths: Tokens of each sequence of this rank, at least 1: integers, in a list, a 1-D tensor or a 1-D array.
                May be empty.
            max_tokens: The most that a micro-batch may cost, in tokens; the same on all ranks.
            padded: Whether sequences are padded to the longest of their micro-batch, which then costs count x longest.
                False if they are packed; it then costs the sum of its lengths. The same on all ranks.

        Returns:
            The micro-batches, in the order in which all ranks must go through them. Empty if no rank has a sequence.

        Raises:
            ArgumentError: On every rank, if any rank has a sequence that is longer than ``max_tokens`` or another invalid
                argument, or if ranks pass a different ``max_tokens`` or ``padded``.
        """
        with self._running("plan_micro_batches"):
            return planning.plan_micro_batches(self._consensus, lengths, max_tokens, padded)

    # Training

    @final
    def token_log_probs(
        self, model: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, *,
        targets: torch.Tensor | None = None, temperature: float = 1.0, entropy: bool = False, **inputs: object,
    ) -> LogProbs:  # fmt: skip
        """Return the log-probability of each token given those before it, in one forward pass. All ranks must call this.

        With the setting ``fused_linear_logprob``, the logits of the batch are never in memory: the head of the model
        computes them for a few tokens at a time, and again in the backward pass. The result is the same. The first call
        for a model also runs two tokens through it, to check that it does not change what its head computes, and the first
        one with packed sequences runs eight, to check that the model keeps them apart.

        Ranks that share sequences (``sp_size``) pass the same batch, and each computes a slice of it; all of them get the
        whole result.

        Args:
            model: A prepared language model, or the actor that wraps it, whose own ``forward`` is not called.
            input_ids: (B, T), T of at least 2. Token ids.
            attention_mask: (B, T). 0 at padding. None: no padding.
            targets: (B, T - 1). The token whose log-probability is read at each position but the last; -100 leaves a
                position out, at no cost. Default: the next token, ``input_ids[:, 1:]``, and -100 where it is padding, or the
                first token of a sequence: after padding on the left, or where the position ids of packed sequences restart.
            temperature: Positive number by which logits are divided.
            entropy: Return the entropy of each distribution too, with its gradient.
            **inputs: Further arguments of the model's forward, such as ``position_ids`` or ``pixel_values``. The model makes no
                cache unless ``use_cache`` is given: without a mask, position ids that restart mean packed sequences.

        Returns:
            ``(log_probs, entropy)``, each (B, T - 1) in fp32; 0 where a position is left out. ``entropy`` is None unless requested.

        Raises:
            ArgumentError, ArgumentTypeError: A shape, dtype or value does not fit.
            StrategyError: The model was not prepared, or is offloaded.
            UnsupportedOperationError: With ``fused_linear_logprob``, the model has no plain linear head, or changes its
                logits in an unknown way. The model attends across packed sequences.
        """
        with self._running(token_log_probs.CALL):
            own: dict[str, object] = {}
            with self._consensus.together(token_log_probs.CALL, "checking arguments", report=lambda: own) as reports:
                prepared = self._models.require_ready(model, token_log_probs.CALL)
                _check(token_log_probs.CALL, entropy=(entropy, FLAG))
                request = token_log_probs.request(
                    input_ids, attention_mask, targets, temperature, bool(entropy), inputs
                )
                own.update(temperature=float(temperature), entropy=bool(entropy), packed=request.packed)
            self.sequence_parallel.require_same(token_log_probs.CALL, reports)
            if self.config.sp_size == 1 and any(report["packed"] for report in reports):
                token_log_probs.check_packing(prepared, self._consensus, request)
            fused = self.config.fused_linear_logprob
            compute = partial(
                token_log_probs.fused if fused else token_log_probs.from_logits, prepared, self._consensus
            )
            return token_log_probs.of_sequences(self.sequence_parallel, request, compute)

    @final
    def backward(
        self, loss: torch.Tensor, model: nn.Module, optimizer: Optimizer, *,
        denominator: float | torch.Tensor | None = None, retain_graph: bool = False,
    ) -> None:  # fmt: skip
        """Add the gradient of a loss to the update in progress. All ranks must call this.

        May be called any number of times. The update uses the mean of the losses over micro-batches and ranks: do not
        divide the loss by their number. With denominators, it uses the sum of the losses over the sum of the denominators:
        for a loss per token, whatever the number of tokens in each micro-batch::

            strategy.backward((loss_BT * mask_BT).sum(), model, optimizer, denominator=mask_BT.sum())

        Args:
            loss: A scalar whose graph leads to parameters of ``model``.
            model: The model in training.
            optimizer: Its optimizer.
            denominator: The number of items, tokens for example, that the loss is a sum over: at least 0; a number or a
                tensor of one number. Pass one with every loss of an update, on every rank, or with none. A tensor on the
                device causes no synchronisation.
            retain_graph: Keep the graph for another backward pass.

        Raises:
            ArgumentError, ArgumentTypeError: The loss is not a scalar tensor, or the denominator not a number; on a single
                rank, the denominator is negative or not finite.
            StrategyError: The loss has no graph or comes from another model, or the optimizer is another model's; on a
                single rank, some losses of the update have a denominator and others do not. The last two drop the update
                in progress; with several ranks, or for a value on the device, `optimizer_step` raises them.
        """
        with self._running("backward"):
            trained = self._trained(model, optimizer, "backward")
            if self.config.sp_size > 1:
                self.sequence_parallel.check_loss(loss)
            update.backward(self.backend, trained, loss, denominator=denominator, retain_graph=retain_graph)

    @final
    def optimizer_step(
        self, optimizer: Optimizer, model: nn.Module, scheduler: LRScheduler | None = None, name: str = "model", *,
        boundary: bool | None = None,
    ) -> StepResult:  # fmt: skip
        """End a micro-batch. Every `accumulated_gradient`-th makes an update: reduce, clip, step, schedule.

        If the gradient is not finite on any rank, or the denominators of the update add up to 0, all ranks skip the update:
        parameters, optimizer state, schedule and step counter do not change. All ranks must call this.

        Args:
            optimizer: The model's optimizer.
            model: The model in training.
            scheduler: Its schedule, which steps with each applied update, and only if it is passed.
            name: Name of the model in error messages.
            boundary: Whether to update now, for a varying number of micro-batches; the same on all ranks. None: at the
                K-th call.

        Returns:
            Whether the update was applied or skipped, the gradient norm before clipping, and the sum of the denominators.

        Raises:
            ArgumentError: On every rank, if a denominator was negative or not finite on any; the update was dropped.
            LightRFTError: The optimizer, model or scheduler belongs to another model. With several ranks, every rank raises
                it at the call that ends the update, and the update is dropped.
            StrategyError: `backward` was not called; the ranks pass different values of ``boundary``; or, on every
                rank, losses of the update came with and without a denominator on any, or ``max_skipped_updates``
                consecutive updates were not finite.
        """
        with self._running("optimizer_step" if name == "model" else f"optimizer_step of {name}"):
            trained = self._trained_or_pending(model, optimizer)
            if trained.optimizer_offloaded:
                self._load_optimizer(trained, None)
            rate = trained.optimizer.param_groups[0]["lr"] + 0.0  # a copy: a schedule may change a tensor in place
            result = update.optimizer_step(self.backend, trained, scheduler, boundary, self._consensus)
            if self._tracking.recorder is not None:
                self._tracking.recorder.updated(trained, name, result, rate)
            if self._stop.is_watching and not self._models.has_pending_gradient:
                self._stop.agree()
            return result

    def _trained_or_pending(self, model: nn.Module, optimizer: Optimizer) -> TrainedModel:
        """Return the model in training; if an argument is wrong, the only one with a gradient, whose update then raises."""
        try:
            return self._trained(model, optimizer, "optimizer_step")
        except LightRFTError as error:
            pending = [trained for trained in self._models.in_training if trained.backward_calls]
            if len(pending) != 1:
                raise
            update.defer_to_boundary(error, pending[0], self.backend.world)
            return pending[0]

    def _trained(self, model: nn.Module, optimizer: Optimizer, call: str) -> TrainedModel:
        if not self._models.is_trained(model, optimizer):
            check_kinds(call, model, optimizer)
            self._preparation.accept_unprepared(model, optimizer)
        return self._models.require_trained(model, optimizer, call)

    @final
    def moving_average(
        self, model: nn.Module, model_ema: nn.Module, beta: float = 0.992, device: torch.device | str | None = None
    ) -> None:
        """Set ``model_ema = beta * model_ema + (1 - beta) * model``, for the parameters that ``model`` trains.

        Call it after `optimizer_step`: the average moves once if an update was applied since the last call, and not for
        updates before it was prepared. Buffers, such as the statistics of BatchNorm, are not averaged; a warning names those that training
        changes. All ranks must call this.

        Args:
            model: The model in training.
            model_ema: A copy of it, prepared for inference; keep it in fp32.
            beta: At least 0, less than 1.
            device: Device to compute on. Default: the device of ``model_ema``.

        Raises:
            ArgumentError: ``beta`` is out of range, or the average lacks a parameter.
            StrategyError: A model was not prepared, or is offloaded.
        """
        with self._running("moving_average"):
            with self._consensus.together("moving_average", "checking arguments"):
                prepared = self._models.require_ready(model, "moving_average")
                if prepared.trained is None:
                    raise StrategyError(
                        f"moving_average: expected a model in training, got {prepared.class_name}, which is not. Pass the "
                        f"model first and its average second"
                    )
                average = self._models.require_ready(model_ema, "moving_average").module
                _check("moving_average", beta=(beta, NUMBER))
                target = device_of("moving_average", device)
            self._averages.move(prepared.trained, average, beta, target)

    @property
    def stop_requested(self) -> bool:
        """Whether SIGTERM reached some rank inside `saving_on_sigterm`; the same on all ranks.

        Becomes True at the end of an `optimizer_step` that made an update, unless a model has pending gradients.
        """
        return self._stop.agreed

    @contextmanager
    def saving_on_sigterm(self, save: Callable[[], object]) -> Iterator[None]:
        """Save when a cluster scheduler announces preemption by SIGTERM. All ranks must enter this.

        A SIGTERM on any rank sets `stop_requested` on all ranks at the next update. The training loop checks it and
        ends, and ``save`` runs on exit from the block. The process is not terminated: the script ends with an exit code
        other than 0 if the scheduler is to start it again::

            with strategy.saving_on_sigterm(lambda: strategy.save_ckpt(model, "checkpoints")):
                for batch in loader:
                    ...
                    strategy.optimizer_step(optimizer, model)
                    if strategy.stop_requested:
                        break

        Args:
            save: Called on every rank after the block if a stop was requested; usually calls `save_ckpt`.

        Raises:
            StrategyError: Not in the main thread, or inside another such block.
        """
        if not callable(save):
            raise refusal("saving_on_sigterm", "save", save, FUNCTION, "Pass lambda: strategy.save_ckpt(...)")
        with self._stop.watching():
            yield
            if self.stop_requested:
                save()

    # Memory

    @final
    def maybe_offload_optimizer(self, optimizer: Optimizer) -> Optimizer:
        """If ``adam_offload`` is set, move the optimizer's state to host memory. Idempotent. Any rank may call this.

        Args:
            optimizer: An optimizer that `prepare` returned.

        Returns:
            ``optimizer``.
        """
        with self._running("maybe_offload_optimizer"):
            _check("maybe_offload_optimizer", optimizer=(optimizer, OPTIMIZER))
            prepared = self._models.owner(optimizer)
            if self.config.adam_offload and prepared is not None and prepared.trained is not None:
                self.backend.move_optimizer(prepared.trained, torch.device("cpu"))
                prepared.trained.optimizer_offloaded = True
            return optimizer

    @final
    def maybe_load_optimizer(self, optimizer: Optimizer, device: torch.device | str | None = None) -> Optimizer:
        """Undo `maybe_offload_optimizer`; `optimizer_step` does so automatically. Any rank may call this.

        Args:
            optimizer: An optimizer that `prepare` returned.
            device: The device to move the state to. Default: the device of the models.

        Returns:
            ``optimizer``.
        """
        with self._running("maybe_load_optimizer"):
            _check("maybe_load_optimizer", optimizer=(optimizer, OPTIMIZER))
            device = device_of("maybe_load_optimizer", device)
            prepared = self._models.owner(optimizer)
            if prepared is not None and prepared.trained is not None and prepared.trained.optimizer_offloaded:
                self._load_optimizer(prepared.trained, device)
            return optimizer

    def _load_optimizer(self, trained: TrainedModel, device: torch.device | None) -> None:
        self.backend.move_optimizer(trained, self.world.device if device is None else device)
        trained.optimizer_offloaded = False

    @final
    def offload_model(self, models: object, empty_cache: bool = True) -> None:
        """Move prepared models to host memory; they cannot be called until `reload_model`. All ranks must call this.

        Args:
            models: One model or a list; anything that is not a module is skipped.
            empty_cache: Free cached device memory afterwards.

        Raises:
            StrategyError: A model was not prepared.
        """
        with self._running("offload_model"):
            self._check_on_all("offload_model", empty_cache=(empty_cache, FLAG))
        self._move_models("offload_model", models, torch.device("cpu"), offloaded=True)
        if empty_cache:
            self.sync_and_clear_cache()

    @final
    def reload_model(self, models: object) -> None:
        """Undo `offload_model`: move the models back to the device. Idempotent. All ranks must call this."""
        self._move_models("reload_model", models, self.world.device, offloaded=False)

    def _move_models(self, call: str, models: object, device: torch.device, *, offloaded: bool) -> None:
        with self._running(call):
            modules = [
                model
                for model in (models if isinstance(models, (list, tuple)) else [models])
                if isinstance(model, nn.Module)
            ]
            with self._consensus.together(call, "checking arguments"):
                known = [self._models.require_known(model, call) for model in modules]
            for prepared in known:
                if prepared.offloaded != offloaded:
                    self.backend.reshard(prepared.module)
                    self.backend.move_model(prepared.module, device)
                    prepared.offloaded = offloaded

    # Checkpoints

    @final
    def save_ckpt(
        self, model: Models, save_dir: str | PathLike[str], tag: str | None = None, max_num: int = 3,
        max_mem: float = 1000, client_state: Mapping[str, Any] | None = None, save_latest: bool = True,
        optimizer: Optimizer | Mapping[str, Optimizer] | None = None, scheduler: object = None, *,
        keep: Collection[str] = (),
    ) -> Path:  # fmt: skip
        """Save the state of the run to ``save_dir/tag``. All ranks must call this.

        The state is the weights in master precision, the optimizer, the schedule, the counters, the random states of
        every rank, the positions of the loaders, and ``client_state``. The checkpoint is atomic: after a crash it is
        complete or absent. With ``async_ckpt``, the call returns as soon as the state is copied; an error is printed
        when it occurs, and raised by the next save, load or `close`.

        Args:
            model: One model, or several by name in one checkpoint: ``{"actor": actor, "critic": critic}``.
            save_dir: A directory on a file system that all hosts share.
            tag: Name of the checkpoint. Default: ``global_stepN`` after N updates. The new checkpoint replaces an older
                one with this name and the same models, once it is complete.
            max_num: Number of checkpoints to keep; the oldest are removed once this one is complete. Only checkpoints
                in ``save_dir`` that hold the same models and come from this run, or a run that it continues, count: a
                new run in an old directory adds to it, and warns once.
            max_mem: Total size of these checkpoints to keep, in gigabytes.
            client_state: None, bool, int, float, str, bytes, or nested lists, tuples and dicts of these. Rank 0's is
                stored.
            save_latest: Whether `load_ckpt` without a tag may load this checkpoint.
            optimizer: The optimizer of a model that was not prepared; by name for several models.
            scheduler: Its schedule. Default: the one passed to `prepare`.
            keep: Tags of checkpoints that are not removed and do not count, such as the best one so far. Pass them with
                each save.

        Returns:
            The path of the checkpoint, the same on every rank.

        Raises:
            StrategyError: On every rank, if gradients are pending or the models cannot be saved.
            CheckpointError: On every rank, if writing fails; older checkpoints stay.
        """
        with self._running("save_ckpt"):
            self._check_on_all("save_ckpt", save_dir=(save_dir, PATH), save_latest=(save_latest, FLAG))
            items = self._run_state.items("save_ckpt", model, optimizer, scheduler)
            return self._checkpoint_saver.save(
                items, save_dir, tag, max_num, max_mem, client_state, bool(save_latest), keep
            )

    @final
    def load_ckpt(
        self, model: Models, load_dir: str | PathLike[str], tag: str | None = None, load_module_strict: bool = True,
        load_optimizer_states: bool = True, load_lr_scheduler_states: bool = True, load_module_only: bool = False,
        optimizer: Optimizer | Mapping[str, Optimizer] | None = None, scheduler: object = None,
    ) -> tuple[Path, Any]:  # fmt: skip
        """Resume from a checkpoint that any strategy saved on any number of ranks. All ranks must call this.

        The batch sizes may differ too: positions of loaders count samples over all ranks. The checkpoint is verified
        before any state changes. Rank r gets the random states of rank r modulo the number of ranks that saved.

        Args:
            model: One prepared model, or several by name: all models of the checkpoint, or some of them.
            load_dir: The directory passed to `save_ckpt`.
            tag: Name of the checkpoint. Default: the newest.
            load_module_strict: Raise if the parameter names differ; False loads the parameters that both have.
            load_optimizer_states: Load the optimizer's state and hyperparameters.
            load_lr_scheduler_states: Load the schedule.
            load_module_only: Load weights and buffers, and nothing else.
            optimizer: As for `save_ckpt`.
            scheduler: As for `save_ckpt`.

        Returns:
            The path of the checkpoint and the client state.

        Raises:
            CheckpointNotFoundError: On every rank, if there is no such checkpoint; lists the available tags.
            CheckpointError: On every rank; names the damaged file or the mismatch.
        """
        with self._running("load_ckpt"):
            self._checkpoint_saver.finish()
            self._check_on_all(
                "load_ckpt", load_dir=(load_dir, PATH), load_module_strict=(load_module_strict, FLAG),
                load_optimizer_states=(load_optimizer_states, FLAG),
                load_lr_scheduler_states=(load_lr_scheduler_states, FLAG), load_module_only=(load_module_only, FLAG),
            )  # fmt: skip
            options = LoadOptions.of(
                strict=load_module_strict, optimizer=load_optimizer_states, scheduler=load_lr_scheduler_states,
                module_only=load_module_only,
            )  # fmt: skip
            items = self._run_state.items("load_ckpt", model, optimizer, scheduler)
            return load_checkpoint(self._run_state, items, load_dir, tag, options)

    @final
    def save_model(
        self, model: nn.Module, tokenizer: object, output_dir: str | PathLike[str], *, processor: object = None,
        dtype: torch.dtype | None = None, max_shard_size: int | str = "5GB", merge_adapters: bool = False,
    ) -> Path:  # fmt: skip
        """Write a prepared model as a directory that ``from_pretrained`` opens. All ranks must call this.

        The directory is written atomically and replaces an existing one.

        Args:
            model: The model. If it is not a transformers model, only its weights are written.
            tokenizer: Written to the same directory, or None.
            output_dir: The directory.
            processor: Written to the same directory, or None.
            dtype: Type of floating-point tensors. Default: the type in which the model computes.
            max_shard_size: Largest safetensors file, in bytes or as text such as "5GB".
            merge_adapters: For a model with PEFT adapters, write the full model with the adapters merged in, instead of
                only the adapters. The model in memory does not change.

        Returns:
            The path of the directory, the same on every rank.

        Raises:
            CheckpointError: On every rank, if it cannot be written.
        """
        with self._running(save_model.CALL):
            with self._consensus.together(save_model.CALL, "checking arguments"):
                prepared = self._models.require_ready(model, save_model.CALL)
                _check(
                    save_model.CALL, output_dir=(output_dir, PATH), dtype=(dtype, DTYPE),
                    merge_adapters=(merge_adapters, FLAG),
                )  # fmt: skip
                check_processor(save_model.CALL, "tokenizer", tokenizer)
                check_processor(save_model.CALL, "processor", processor)
                target = user_path(output_dir, "output_dir")
            return save_model.save_model(
                self.backend, self._consensus, prepared, target, dtype=dtype, max_shard_size=max_shard_size,
                merge_adapters=merge_adapters, processors={"tokenizer": tokenizer, "processor": processor},
            )  # fmt: skip

    @final
    def load_model(
        self, model: nn.Module, path: str | PathLike[str], *, strict: bool = True, allow_pickle: bool = False
    ) -> LoadedNames:
        """Load weights into a prepared model and its master weights; nothing else changes. All ranks must call this.

        Args:
            model: The model.
            path: A Hugging Face directory of a model or, for a model with PEFT adapters, of its adapters; or a
                checkpoint that LightRFT itself wrote with torch.distributed.checkpoint or DeepSpeed.
            strict: Raise if names are missing or unexpected, instead of skipping them.
            allow_pickle: Read pickle files, which can run code, if the weights are in no other format.

        Returns:
            The names that were skipped.

        Raises:
            CheckpointError: On every rank, before anything changes, if files are missing or damaged, or shapes differ.
        """
        with self._running(load_model.CALL):
            with self._consensus.together(load_model.CALL, "checking arguments"):
                prepared = self._models.require_ready(model, load_model.CALL)
                _check(load_model.CALL, path=(path, PATH), strict=(strict, FLAG), allow_pickle=(allow_pickle, FLAG))
                source = user_path(path, "path")
            return load_model.load_model(
                self.backend, self._consensus, prepared, source, strict=strict, allow_pickle=allow_pickle
            )

    # Rollouts

    @final
    def full_parameters(
        self, model: nn.Module, bucket_bytes: int | None = None, dtype: torch.dtype | None = None
    ) -> Iterator[list[tuple[str, torch.Tensor]]]:
        """Yield the full parameters and persistent buffers of a prepared model, one bucket at a time, on every rank.

        Names and layouts are those that ``save_pretrained`` writes; tied tensors come once. All ranks must consume all
        buckets.

        Args:
            model: The model.
            bucket_bytes: Maximum bytes of a bucket, unless one tensor is larger. Default: ``weight_sync_bucket_bytes``.
            dtype: Type of floating-point tensors. Default: the type in which the model computes.

        Yields:
            Names and full tensors, which may share the model's memory; valid until the next bucket.

        Raises:
            StrategyError: The model was not prepared, or is offloaded.
        """
        with self._running("full_parameters"), self._consensus.together("full_parameters", "checking arguments"):
            _check("full_parameters", bucket_bytes=(bucket_bytes, SIZE), dtype=(dtype, DTYPE))
            prepared = self._models.require_ready(model, "full_parameters")
        buckets = self._rollout.parameters_of(self.backend, prepared, bucket_bytes, dtype)
        while True:
            with self._running("full_parameters"):
                bucket = next(buckets, None)
            if bucket is None:
                return
            yield bucket

    @property
    def inference_engine(self) -> RolloutEngine | None:
        """The rollout engine; None before `setup_inference_engine`. If it runs on another rank, a placeholder that refuses calls."""
        return self._rollout.handle

    @property
    def inference_engine_status(self) -> EngineStatus:
        """Whether the engine is absent, awake or asleep."""
        return self._rollout.status

    @property
    def engine_mp_group(self) -> dist.ProcessGroup | None:
        """The ranks that share this rank's engine; None without a process group."""
        return self._rollout.mp_group

    @property
    def engine_dp_group(self) -> dist.ProcessGroup | None:
        """The ranks at the same position in the other engines; None without a process group."""
        return self._rollout.dp_group

    @final
    def setup_inference_engine(
        self, args: object = None, engine_type: str | None = None, actor: nn.Module | None = None
    ) -> RolloutEngine | None:
        """Build the rollout engine, send it the weights of ``actor``, and put it to sleep. All ranks must call this.

        It stays awake without ``enable_engine_sleep``.

        Args:
            args: Engine settings that override this strategy's, and ``pretrain``, the path of the model.
            engine_type: A registered name. Default: the setting.
            actor: A model in training.

        Returns:
            The engine; on ranks that share an engine of another rank, a placeholder that refuses calls.

        Raises:
            ConfigError, BackendNotInstalledError: The engine is unknown, or not installed.
        """
        with self._running("setup_inference_engine"):
            with self._consensus.together("setup_inference_engine", "checking arguments"):
                config = self._config_of(args, "setup_inference_engine")
                prepared = None if actor is None else self._models.find(actor)
                if actor is not None and (prepared is None or prepared.meta_model is None):
                    raise StrategyError(
                        f"setup_inference_engine: expected an actor that is prepared for training, got another "
                        f"{type(actor).__name__}. Call prepare((actor, optimizer, scheduler)) first"
                    )
            self._rollout.setup(config.engine_type if engine_type is None else engine_type, config, prepared)
        if actor is not None:
            self.update_engine_weights(actor)
        self.maybe_sleep_inference_engine()
        return self._rollout.handle

    @final
    def maybe_sleep_inference_engine(self) -> None:
        """Put the engine, if any, to sleep if ``enable_engine_sleep`` is set. All ranks must call this."""
        with self._running("maybe_sleep_inference_engine"):
            self._rollout.sleep()

    @final
    def wakeup_inference_engine(self) -> None:
        """Wake the engine, if any; generating and syncing do so automatically. All ranks must call this."""
        with self._running("wakeup_inference_engine"):
            self._rollout.wake()

    @final
    def update_engine_weights(self, actor: nn.Module) -> None:
        """Send all weights of ``actor`` to the engine. All ranks must call this.

        Without an engine, it prints a message and does nothing, whatever the model. For a model with PEFT adapters, it sends
        the base model's weights with the active adapters merged in. The engine then ends sequences at the end-of-sequence tokens
        that the actor's configurations name at this time. After a failure the engine is stale and refuses to generate
        until a sync succeeds.

        Args:
            actor: A prepared model.

        Raises:
            EngineError: On every rank, before the engine changes, if names or shapes differ from those of the engine's
                checkpoint.
        """
        with self._running("update_engine_weights"):
            self._check_on_all("update_engine_weights", actor=(actor, MODULE))
            self._rollout.sync(self.backend, self._models, actor)
            if self._tracking.recorder is not None and self._rollout.handle is not None:
                prepared = self._models.require_known(actor, "update_engine_weights")
                self._tracking.recorder.synced(prepared.trained, self._rollout.handle.weight_version)

    @final
    def engine_generate_local(
        self, sampling_params: object, prompt_token_ids: Sequence[Any] | None = None,
        multi_modal_inputs: Sequence[dict[str, Any]] | None = None,
    ) -> list[Completion]:  # fmt: skip
        """Generate completions on this rank's engine, which wakes up first if it sleeps. Other ranks need not call this.

        Args:
            sampling_params: A `Sampling`, a dict, vLLM's ``SamplingParams`` or transformers' ``GenerationConfig``.
            prompt_token_ids: Token ids of each prompt, or a tokenizer's output, whose padding is left out.
            multi_modal_inputs: LightRFT's ``{"prompt": ..., "multi_modal_data": ...}`` dicts, instead of token ids.

        Returns:
            The completions in the order of the prompts; the ``n`` completions of a prompt are adjacent.

        Raises:
            ArgumentError: Both token ids and multimodal inputs are given, or neither.
            EngineError: There is no engine, or it runs on another rank.
        """
        with self._running("engine_generate_local"):
            return self._recorded(self._rollout.generate_local(sampling_params, prompt_token_ids, multi_modal_inputs))

    @final
    def gather_and_generate(
        self, sampling_params: object, all_prompt_token_ids: Sequence[Any] | None = None,
        all_prompts: Sequence[str] | None = None, all_images: Sequence[Any] | None = None, sleep_engine: bool = True,
        images_num: Sequence[int] | None = None, all_videos: Sequence[Any] | None = None,
        videos_num: Sequence[int] | None = None,
    ) -> list[Completion]:  # fmt: skip
        """Generate completions of each rank's prompts; their number may differ. All ranks must call this.

        If ranks that share sequences (``sp_size``) pass the same prompts, without images and videos, each of them completes
        a part, and all get the same completions.

        Args:
            sampling_params: A `Sampling`, a dict, vLLM's ``SamplingParams`` or transformers' ``GenerationConfig``.
            all_prompt_token_ids: Token ids of each prompt, or a tokenizer's output, whose padding is left out.
            all_prompts: Text of each prompt, instead of or in addition to token ids.
            all_images: Images: one list per prompt, or a flat list with ``images_num``.
            sleep_engine: Put the engine to sleep afterwards if ``enable_engine_sleep`` is set.
            images_num: Number of images of each prompt.
            all_videos: Videos: one list per prompt, or a flat list with ``videos_num``.
            videos_num: Number of videos of each prompt.

        Returns:
            The completions of this rank's prompts, in order; the ``n`` completions of a prompt are adjacent.

        Raises:
            ArgumentError, EngineError: On every rank, if any rank fails.
        """
        with self._running("gather_and_generate"):
            self._check_on_all(
                "gather_and_generate", all_images=(all_images, LIST), sleep_engine=(sleep_engine, FLAG),
                images_num=(images_num, LIST), all_videos=(all_videos, LIST), videos_num=(videos_num, LIST),
            )  # fmt: skip
            return self._recorded(self._rollout.gather_and_generate(
                sampling_params, sleep_engine, self._build_multimodal_inputs, all_prompt_token_ids, all_prompts, all_images,
                images_num, all_videos, videos_num,
            ))  # fmt: skip

    def _recorded(self, completions: list[Completion]) -> list[Completion]:
        if self._tracking.recorder is not None:
            truncated = sum(completion.finish_reason == "length" for completion in completions)
            lengths = [len(completion.output_token_ids) for completion in completions]
            self._tracking.recorder.generated(lengths, truncated)
        return completions


def _check(call: str, **arguments: tuple[object, Expected]) -> None:
    """Raise `ArgumentTypeError` or `ArgumentError` unless every argument of ``call`` is as expected."""
    for name, (value, expected) in arguments.items():
        accepted: Any = isinstance(value, expected.types) and not isinstance(value, expected.excluded)
        if accepted and value is not None:
            number: Any = value
            accepted = (expected.least is None or number >= expected.least) and (
                expected.below is None or number < expected.below
            )
        if not accepted:
            raise refusal(call, name, value, expected)


def _shared_settings(config: StrategyConfig) -> list[list[object]]:
    """Return the settings that must be the same on all ranks, as JSON values."""
    shared = {name: value for name, value in config.to_dict().items() if name not in _PER_RANK_SETTINGS}
    return [[name, list(value) if isinstance(value, tuple) else value] for name, value in shared.items()]
