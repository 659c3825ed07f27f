"""Rollouts: setting up the engine, syncing weights to it, and generating.

A rollout step wakes the weights, syncs, wakes the KV cache, generates and sleeps, in this order. The same code serves
every engine and every backend.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from enum import Enum
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn

from lightrft.config import ArgumentError, ConfigError, EngineError, LightRFTError, StrategyConfig
from lightrft.config.validation import shown
from lightrft.strategy.backend.contract import Backend
from lightrft.strategy.distributed.rank_consensus import RankConsensus
from lightrft.strategy.distributed.world import World, all_gather_objects
from lightrft.strategy.models import weight_stream
from lightrft.strategy.models.adapters import base_without_adapters, has_adapters
from lightrft.strategy.models.modules import with_buffers_of
from lightrft.strategy.models.registry import ModelRegistry, PreparedModel
from lightrft.strategy.models.state_dict_adapter import StateDictAdapter
from lightrft.strategy.models.weight_stream import Bucket
from lightrft.strategy.parallel.sequence import SequenceParallel
from lightrft.strategy.rollout import multimodal
from lightrft.strategy.rollout.embedded import changed_settings, eos_token_ids_of_model
from lightrft.strategy.rollout.engine import (
    PARTS,
    Completion,
    EngineBase,
    EngineRequest,
    Prompt,
    RolloutEngine,
    engine_class,
)
from lightrft.strategy.rollout.engine_placeholder import EnginePlaceholder
from lightrft.strategy.rollout.sampling import Sampling
from lightrft.strategy.supported_settings import validate_engine
from lightrft.strategy.telemetry.log import logger, print_on_rank_0


class EngineStatus(Enum):
    """Whether there is a rollout engine, and whether it is awake."""

    ABSENT = "absent"
    AWAKE = "awake"
    ASLEEP = "asleep"


class Rollout:
    """The rollout engine of this rank, which it may share with other ranks."""

    def __init__(
        self, world: World, consensus: RankConsensus, sequence_parallel: SequenceParallel, config: StrategyConfig
    ) -> None:
        self._world, self._consensus, self._sequence_parallel, self._config = (
            world,
            consensus,
            sequence_parallel,
            config,
        )
        self.engine: RolloutEngine | None = None
        """The engine that runs on this rank."""
        self._placeholder: EnginePlaceholder | None = None
        """In place of the engine, if it runs on another rank."""
        self._engine_config = config
        self._warned_of = ""
        """The generation settings of the actor that the last warning named."""
        self.mp_group, self.dp_group = self._make_groups()

    def _make_groups(self) -> tuple[dist.ProcessGroup | None, dist.ProcessGroup | None]:
        """Return the group that shares this rank's engine, and the group with the same position in other engines."""
        size, share = self._world.size, self._config.engine_tp_size
        if size % share:
            raise ConfigError(
                f"engine_tp_size={share}: expected a divisor of the number of ranks, got {size} ranks. Choose a "
                f"divisor of {size}"
            )
        if self._world.cpu_group is None:
            return None, None
        position = self._world.rank % share
        first = self._world.rank - position
        return self._group_of(range(first, first + share)), self._group_of(range(position, size, share))

    def _group_of(self, ranks: Sequence[int]) -> dist.ProcessGroup | None:
        return self._world.cpu_group if len(ranks) == self._world.size else self._world.new_group(list(ranks))

    # The engine

    @property
    def status(self) -> EngineStatus:
        """Absent, awake or asleep; awake as soon as the weights have memory."""
        engine = self.handle
        if engine is None:
            return EngineStatus.ABSENT
        return EngineStatus.AWAKE if "weights" in engine.awake else EngineStatus.ASLEEP

    @property
    def handle(self) -> RolloutEngine | None:
        """The engine, or the `EnginePlaceholder` if it runs on another rank; None if there is none."""
        return self.engine or self._placeholder

    def setup(self, engine_type: str, config: StrategyConfig, actor: PreparedModel | None) -> RolloutEngine | None:
        """Build the engine; see `StrategyBase.setup_inference_engine`. All ranks must call this.

        Args:
            engine_type: A registered name or ``module:attribute``.
            config: The settings of the engine.
            actor: The model whose architecture the engine may run.

        Returns:
            `handle`.
        """
        if config.engine_tp_size != self._config.engine_tp_size:
            raise ConfigError(
                f"setup_inference_engine: expected engine_tp_size={self._config.engine_tp_size}, as the strategy was "
                f"created with, got {config.engine_tp_size}. Pass engine_tp_size to get_strategy"
            )
        self.shutdown()
        self._engine_config = config
        actor = None if actor is None else actor.exported
        try:
            with self._consensus.together("setup_inference_engine"):
                cls = engine_class(engine_type)
                validate_engine(config, engine_type, cls.supported_settings)
                if not (cls.leader_only and self._world.rank % config.engine_tp_size):
                    self.engine = self._build(cls, config, None if actor is None else _model_for_engine(actor))
        except BaseException:
            self.shutdown()  # another rank failed
            raise
        if cls.leader_only and config.engine_tp_size > 1:
            max_model_len = self._consensus.exchange(
                "setup_inference_engine", getattr(self.engine, "max_model_len", None)
            )
            self._placeholder = EnginePlaceholder(max_model_len[self._leader]) if self.engine is None else None
        if actor is not None:
            self._use_eos_token_ids_of(actor, "setup_inference_engine")
        return self.handle

    def _use_eos_token_ids_of(self, actor: PreparedModel, call: str) -> None:
        """Let sequences end at the token ids that the configuration of ``actor`` names now; warn of other changes in it."""
        if isinstance(self.engine, EngineBase):
            self.engine.eos_token_ids = eos_token_ids_of_model(actor.module)
        changed = changed_settings(actor.module, actor.names_model)
        if changed and changed != self._warned_of:
            self._warned_of = changed
            logger.warning(
                "%s: expected only eos_token_id to change in the model's generation_config after prepare, got %s. save_model writes "
                "this, but the engine ignores it. Pass it to gather_and_generate, as a sampling parameter", call, changed,
            )  # fmt: skip

    def _build(self, cls: type[EngineBase], config: StrategyConfig, meta_model: nn.Module | None) -> EngineBase:
        request = EngineRequest(
            config=config,
            device=self._world.device,
            rank=self._world.rank,
            group=self.mp_group if config.engine_tp_size > 1 else None,
            model_path=_model_path(config.get_extra_arg("pretrain")),
            meta_model=meta_model,
        )
        try:
            return cls.build(request)
        except LightRFTError:
            raise
        except Exception as error:
            raise EngineError(
                f"setup_inference_engine: {cls.__name__} could not be built: {type(error).__name__}: {error}. "
                f"See the cause above, and check the engine's settings"
            ) from error

    def shutdown(self) -> None:
        """End the engine, if there is one. Idempotent."""
        engine, self.engine = self.engine, None
        self._placeholder = None
        if engine is not None:
            engine.shutdown()

    def release_groups(self) -> None:
        """Drop the references to the process groups; `shutdown` was called before."""
        self.mp_group = self.dp_group = None

    def sleep(self) -> None:
        """Put the engine to sleep, if ``enable_engine_sleep`` is set. Idempotent."""
        if self._engine_config.enable_engine_sleep and self.status is not EngineStatus.ABSENT:
            with self._together_if_shared("maybe_sleep_inference_engine"):
                if self.engine is not None:
                    self.engine.sleep()

    def wake(self) -> None:
        """Wake all parts of the engine. Idempotent. All ranks that share engines must call this, and `sleep`."""
        if self.status is not EngineStatus.ABSENT:
            with self._together_if_shared("wakeup_inference_engine"):
                if self.engine is not None:
                    self.engine.wake_up()

    def _together_if_shared(self, call: str) -> AbstractContextManager[None]:
        return self._together(call) if self._config.engine_tp_size > 1 else nullcontext()

    @contextmanager
    def _together(self, call: str) -> Iterator[None]:
        """Run the body like `RankConsensus.together`, and update the status of engines that other ranks hold."""
        reports: list[str] = []
        try:
            with self._consensus.together(call, report=lambda: self.status.value) as reports:
                yield
        finally:
            if reports and self._placeholder is not None:  # also after an error
                is_awake = EngineStatus(reports[self._leader]) is EngineStatus.AWAKE
                self._placeholder.awake = PARTS if is_awake else frozenset()

    @property
    def _leader(self) -> int:
        """The first of the ranks that share this rank's engine."""
        return self._world.rank - self._world.rank % self._config.engine_tp_size

    # Weights

    def parameters_of(
        self, backend: Backend, model: PreparedModel, bucket_bytes: int | None, dtype: torch.dtype | None
    ) -> Iterator[Bucket]:
        """Yield the full parameters of ``model``; see `StrategyBase.full_parameters`."""
        backend.reshard(model.module)
        limit = backend.config.weight_sync_bucket_bytes if bucket_bytes is None else bucket_bytes
        stream_dtype = dtype or (torch.bfloat16 if backend.config.bf16 else None)
        converter = StateDictAdapter.of(model.exported.module)
        yield from weight_stream.full_parameters(backend, converter, limit, stream_dtype)

    def sync(self, backend: Backend, models: ModelRegistry, model: nn.Module) -> None:
        """Send all weights of ``model``, and its end-of-sequence token ids, to the engine. All ranks must call this.

        Compares names and shapes first, then streams. A sync that fails on one rank is revoked on all.
        """
        if self.status is EngineStatus.ABSENT:
            print_on_rank_0(
                "update_engine_weights: there is no engine, so nothing was sent. setup_inference_engine creates one"
            )
            return
        actor = models.require_ready(model, "update_engine_weights")
        with self._consensus.together("update_engine_weights"):
            backend.reshard(actor.module)
            actor = actor.exported
            converter = weight_stream.converter_for_engines(actor.module, actor.meta_model)
            self._check_coverage(weight_stream.full_shapes(backend, converter))
        dtype = torch.bfloat16 if self._engine_config.bf16 or backend.config.bf16 else None
        before = 0 if self.engine is None else self.engine.weight_version
        try:
            with self._together("update_engine_weights"):
                bucket_bytes = self._engine_config.weight_sync_bucket_bytes
                self._send(weight_stream.full_parameters(backend, converter, bucket_bytes, dtype))
                self._use_eos_token_ids_of(actor, "update_engine_weights")
            if self._placeholder is not None:
                self._placeholder.weight_version += 1
        except BaseException:
            if self.engine is not None and self.engine.weight_version != before:
                self.engine.invalidate_weights("the last weight sync failed on another rank")
            raise

    def _check_coverage(self, sent: Mapping[str, torch.Size]) -> None:
        """Raise, before the engine changes, unless the names and shapes ``sent`` are those of its checkpoint."""
        expected = None if self.engine is None else self.engine.expected_weights
        if expected is None:
            return
        missing, unknown = sorted(expected.keys() - sent.keys()), sorted(sent.keys() - expected.keys())
        reshaped = sorted(name for name in sent.keys() & expected.keys() if sent[name] != expected[name])
        reasons = [
            f"{len(names)} {words} ({', '.join(names[:3])})"
            for names, words in [
                (missing, "weights of the engine's checkpoint are not in the model"),
                (unknown, "weights of the model are not in the engine's checkpoint"),
                (reshaped, "weights have another shape there"),
            ]
            if names
        ]
        if reasons:
            raise EngineError(
                f"update_engine_weights: expected the weights of the engine's checkpoint, but {'; '.join(reasons)}. Nothing "
                f"was sent, and the engine keeps its weights. Build the engine from this model's checkpoint"
            )

    def _send(self, stream: Iterator[Bucket]) -> None:
        if self.engine is not None:
            self.engine.wake_up(["weights"])
        try:
            if self.engine is not None:
                self.engine.update_weights(stream)
        finally:
            for _ in stream:  # without an engine, or after a failure here, this rank still takes part in the gathers
                pass

    # Generation

    def generate_local(
        self, sampling: object, token_ids: Sequence[Any] | None, inputs: Sequence[dict[str, Any]] | None
    ) -> list[Completion]:
        """Complete prompts on this rank's engine; see `StrategyBase.engine_generate_local`."""
        return self._generate(multimodal.one_kind_of_prompts(token_ids, inputs), Sampling.of(sampling))

    def _generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        self._require_engine("engine_generate_local")
        if self.engine is None:
            raise EngineError(
                "engine_generate_local: expected an engine that runs on this rank, got a shared engine that runs on "
                "another rank. Call gather_and_generate on all ranks"
            )
        self.engine.wake_up()
        return self.engine.generate(prompts, sampling)

    def _require_engine(self, call: str) -> None:
        if self.status is EngineStatus.ABSENT:
            raise EngineError(
                f"{call}: expected an engine, got none. Call setup_inference_engine(args, engine_type, actor=actor) first"
            )

    def gather_and_generate(
        self, sampling: object, sleep: bool, build_inputs: multimodal.InputsBuilder, *prompts_and_media: object
    ) -> list[Completion]:
        """Complete this rank's prompts; see `StrategyBase.gather_and_generate`. All ranks must call this.

        Args:
            sampling: What `Sampling.of` reads.
            sleep: Put the engine to sleep afterwards, if ``enable_engine_sleep`` is set.
            build_inputs: Builds prompts with media, if it is not `multimodal.multimodal_inputs`.
            *prompts_and_media: The arguments of `multimodal.build_prompts`.
        """
        own: list[object] = []
        with self._consensus.together("gather_and_generate", report=lambda: own) as reports:
            self._require_engine("gather_and_generate")
            settings = Sampling.of(sampling)
            prompts = multimodal.build_prompts_with(build_inputs, *prompts_and_media)
            own.append(_digest(prompts, settings) if self._sequence_parallel.size > 1 else None)
        to_complete = self._sequence_parallel.prompts_to_complete(prompts, reports)
        with self._together("gather_and_generate"):
            completions = self._generate_shared(prompts if to_complete is None else to_complete, settings)
        if to_complete is not None:
            completions = self._sequence_parallel.gather_completions(completions, len(prompts), settings.n)
        if sleep:
            self.sleep()
        return completions

    def _generate_shared(self, prompts: list[Prompt], sampling: Sampling) -> list[Completion]:
        if self._config.engine_tp_size == 1:
            return self._generate(prompts, sampling)
        requests = all_gather_objects((prompts, sampling), self.mp_group)
        differing = [rank_sampling for _, rank_sampling in requests if rank_sampling != requests[0][1]]
        if differing:
            raise ArgumentError(
                f"gather_and_generate: expected equal sampling parameters on ranks that share an engine, got "
                f"{requests[0][1]} and {differing[0]}. Pass the same on all of them"
            )
        group_prompts = [prompt for rank_prompts, _ in requests for prompt in rank_prompts]
        completions = self._generate_in_group(group_prompts, sampling)
        position = dist.get_rank(self.mp_group)
        start = sum(len(rank_prompts) for rank_prompts, _ in requests[:position]) * sampling.n
        return completions[start : start + len(prompts) * sampling.n]

    def _generate_in_group(self, prompts: list[Prompt], sampling: Sampling) -> list[Completion]:
        """Return, on each rank that shares an engine, the completions of the prompts of all of them."""
        if self.engine is not None and not getattr(self.engine, "leader_only", False):
            return self._generate(prompts, sampling)
        outcome: list[list[Completion] | None] = [None]
        try:
            if self.engine is not None:
                outcome = [self._generate(prompts, sampling)]
        finally:  # the ranks that hold no engine wait for this, also after an error
            leader = dist.get_global_rank(self.mp_group, 0) if self.mp_group is not None else 0
            dist.broadcast_object_list(outcome, src=leader, group=self.mp_group)
        if outcome[0] is None:
            raise EngineError(
                "gather_and_generate: expected completions from the rank that holds this rank's engine, but it failed. See its error"
            )
        return outcome[0]


def _digest(prompts: Sequence[Prompt], sampling: Sampling) -> str | None:
    """Return a checksum of what to generate; None if prompts have media, which are too large to compare."""
    if any(prompt.has_media for prompt in prompts):
        return None
    texts = [(prompt.token_ids, prompt.text) for prompt in prompts]
    return hashlib.sha256(repr((texts, sampling)).encode()).hexdigest()


def _model_path(pretrain: object) -> str | None:
    """Return the path or name of a model, with the home directory for ``~``."""
    if pretrain is None:
        return None
    if not isinstance(pretrain, (str, os.PathLike)):
        raise ConfigError(
            f"setup_inference_engine: expected pretrain to be a path or the name of a model, got {shown(pretrain)}"
        )
    return os.path.expanduser(os.fspath(pretrain))


def _model_for_engine(actor: PreparedModel) -> nn.Module | None:
    """Return a copy of ``actor`` on the meta device, with its buffers and without adapters, for engines to build from."""
    if actor.meta_model is None:
        return None
    model: Any = with_buffers_of(actor.meta_model, actor.module)
    return base_without_adapters(model) if has_adapters(actor.module) else cast(nn.Module, model)
