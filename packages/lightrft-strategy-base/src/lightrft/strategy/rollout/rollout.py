"""Rollouts: the engine's life, the weight sync, and the way of the prompts to it and of completions back.

The order of a step is the only one that can be written: wake the weights, sync, wake the KV cache, generate,
sleep. Which engine it is, and which strategy, makes no difference here.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from enum import Enum
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from lightrft.config import ArgumentError, ConfigError, EngineError, LightRFTError, StrategyConfig
from lightrft.strategy.distributed.collectives import Collectives
from lightrft.strategy.distributed.world import World
from lightrft.strategy.log import say
from lightrft.strategy.registry import engine_class
from lightrft.strategy.rollout.engine import Completion, EngineBase, EngineRequest, Prompt, RolloutEngine
from lightrft.strategy.rollout.sampling import Sampling
from lightrft.strategy.rollout.weights import Bucket
from lightrft.strategy.settings_check import check_engine


class EngineStatus(Enum):
    """Where the rollout engine is in its life."""

    ABSENT = "absent"
    AWAKE = "awake"
    ASLEEP = "asleep"


class Rollout:
    """One rollout engine, or this rank's share of one."""

    def __init__(self, world: World, collectives: Collectives, config: StrategyConfig) -> None:
        self._world, self._collectives, self._config = world, collectives, config
        self.engine: RolloutEngine | None = None
        self._status = EngineStatus.ABSENT  # of ranks that share an engine and do not hold it
        self._sleeps = config.enable_engine_sleep
        self.bucket_bytes, self.bf16 = config.weight_sync_bucket_bytes, config.bf16
        self.mp_group, self.dp_group = self._make_groups()

    def _make_groups(self) -> tuple[dist.ProcessGroup | None, dist.ProcessGroup | None]:
        """The ranks that share this rank's engine, and the ranks with the same place in other engines."""
        size, share = self._world.size, self._config.engine_tp_size
        if size % share:
            raise ConfigError(
                f"engine_tp_size={share} does not divide the {size} ranks; each engine takes {share} of them"
            )
        if self._world.control is None:
            return None, None
        place = self._world.rank % share
        sharing = list(range(self._world.rank - place, self._world.rank - place + share))
        return self._group_of(sharing), self._group_of(list(range(place, size, share)))

    def _group_of(self, ranks: list[int]) -> dist.ProcessGroup | None:
        return self._world.control if len(ranks) == self._world.size else self._world.new_group(ranks)

    # Life

    @property
    def status(self) -> EngineStatus:
        """Absent, awake or asleep; awake as soon as the weights are in place."""
        if self.engine is None:
            return self._status
        return EngineStatus.AWAKE if "weights" in self.engine.awake else EngineStatus.ASLEEP

    def setup(self, engine_type: str, config: StrategyConfig, skeleton: Callable[[], Any]) -> RolloutEngine | None:
        """Build the engine; None on ranks that share one and do not hold it."""
        if config.engine_tp_size != self._config.engine_tp_size:
            raise ConfigError(
                f"setup_inference_engine: engine_tp_size={config.engine_tp_size}, and this strategy was made with "
                f"{self._config.engine_tp_size}, by which its ranks share engines; give it to get_strategy"
            )
        self.shutdown()
        self._sleeps = config.enable_engine_sleep
        self.bucket_bytes, self.bf16 = config.weight_sync_bucket_bytes, config.bf16
        try:
            with self._collectives.together("setup_inference_engine"):
                kind = engine_class(engine_type)
                check_engine(config, engine_type, kind)
                if not (kind.leader_only and self._world.rank % config.engine_tp_size):
                    self.engine = self._built(kind, config, skeleton())
        except BaseException:
            self.shutdown()  # of an engine of which another rank has no share
            raise
        self._status = EngineStatus.AWAKE
        return self.engine

    def _built(self, kind: type[EngineBase], config: StrategyConfig, skeleton: nn.Module | None) -> EngineBase:
        request = EngineRequest(
            config=config,
            device=self._world.device,
            rank=self._world.rank,
            group=self.mp_group if config.engine_tp_size > 1 else None,
            model_path=config.get_extra_arg("pretrain"),
            skeleton=skeleton,
        )
        try:
            return kind.build(request)
        except LightRFTError:
            raise
        except Exception as error:
            raise EngineError(
                f"setup_inference_engine: {kind.__name__} could not be built: {type(error).__name__}: {error}"
            ) from error

    def shutdown(self) -> None:
        """End the engine, if there is one."""
        engine, self.engine = self.engine, None
        self._status = EngineStatus.ABSENT
        if engine is not None:
            engine.shutdown()

    def sleep(self) -> None:
        """Put the engine to sleep, where ``enable_engine_sleep`` allows; again is the same as once."""
        if self._sleeps and self.status is not EngineStatus.ABSENT:
            with self._together_if_shared("maybe_sleep_inference_engine"):
                if self.engine is not None:
                    self.engine.sleep()

    def wake(self) -> None:
        """Wake the engine, all of it; again is the same as once. All ranks that share engines call this, and `sleep`."""
        if self.status is not EngineStatus.ABSENT:
            with self._together_if_shared("wakeup_inference_engine"):
                if self.engine is not None:
                    self.engine.wake_up()

    def _together_if_shared(self, call: str) -> AbstractContextManager[None]:
        return self._together(call) if self._config.engine_tp_size > 1 else nullcontext()

    @contextmanager
    def _together(self, call: str) -> Iterator[None]:
        """`Collectives.together`; a rank whose engine another rank holds hears how that one is, after errors too."""
        told: list[Any] = []
        try:
            with self._collectives.together(call, tell=lambda: self.status.value) as told:
                yield
        finally:
            if told and self.engine is None:
                self._status = EngineStatus(told[self._world.rank - self._world.rank % self._config.engine_tp_size])

    # Weights

    def sync(self, names: Callable[[], Mapping[str, torch.Size]], stream: Callable[[], Iterator[Bucket]]) -> None:
        """Send a whole model: ``names`` and shapes of what ``stream`` yields. Every rank calls this."""
        if self.status is EngineStatus.ABSENT:
            say("update_engine_weights: there is no engine, so nothing was sent; setup_inference_engine makes one")
            return
        with self._collectives.together("update_engine_weights"):
            self._check_coverage(names())
        before = 0 if self.engine is None else self.engine.weight_version
        try:
            with self._together("update_engine_weights"):
                self._send(stream())
        except BaseException:
            if self.engine is not None and self.engine.weight_version != before:
                self.engine.revoke_weights("the last weight sync failed on another rank")
            raise

    def _check_coverage(self, names: Mapping[str, torch.Size]) -> None:
        """Raise, before the engine is touched, unless the stream has just what its checkpoint has."""
        expected = None if self.engine is None else self.engine.expected_weights
        if expected is None:
            return
        missing, unknown = sorted(expected.keys() - names.keys()), sorted(names.keys() - expected.keys())
        differing = sorted(name for name in names.keys() & expected.keys() if names[name] != expected[name])
        reasons = [
            f"{len(found)} {words} ({', '.join(found[:3])})"
            for found, words in [
                (missing, "weights of the engine's checkpoint are not in the model"),
                (unknown, "weights of the model are not in the engine's checkpoint"),
                (differing, "have another shape there"),
            ]
            if found
        ]
        if reasons:
            raise EngineError(
                f"update_engine_weights: {'; '.join(reasons)}. Nothing was sent; the engine keeps its weights"
            )

    def _send(self, stream: Iterator[Bucket]) -> None:
        if self.engine is None:
            for _ in stream:  # a rank that holds no engine still takes part in gathering
                pass
            return
        self.engine.wake_up(["weights"])
        try:
            self.engine.update_weights(stream)
        finally:
            for _ in stream:  # after a failure here the other ranks are still gathering with this one
                pass

    # Prompts

    def generate_local(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        """Complete ``prompts`` on this rank's engine, alone."""
        self._require_engine("engine_generate_local")
        if self.engine is None:
            raise EngineError(
                "engine_generate_local: this rank shares an engine that another rank holds; call gather_and_generate on all of them"
            )
        self.engine.wake_up()
        return self.engine.generate(prompts, sampling)

    def _require_engine(self, call: str) -> None:
        if self.status is EngineStatus.ABSENT:
            raise EngineError(
                f"{call}: there is no engine; setup_inference_engine(args, engine_type, actor=actor) makes one"
            )

    def gather_and_generate(
        self, build: Callable[[], list[Prompt]], sampling: Callable[[], Sampling], sleep: bool
    ) -> list[Completion]:
        """Complete each rank's own prompts, whatever their number; those of the ranks that share an engine together."""
        with self._collectives.together("gather_and_generate"):
            self._require_engine("gather_and_generate")
            prompts, settings = build(), sampling()
        with self._together("gather_and_generate"):
            completions = self._generate_shared(prompts, settings)
        if sleep:
            self.sleep()
        return completions

    def _generate_shared(self, prompts: list[Prompt], sampling: Sampling) -> list[Completion]:
        if self._config.engine_tp_size == 1:
            return self.generate_local(prompts, sampling)
        asked: list[Any] = [None] * dist.get_world_size(self.mp_group)
        dist.all_gather_object(asked, (prompts, sampling), group=self.mp_group)
        differing = [it for _, it in asked if it != asked[0][1]]
        if differing:
            raise ArgumentError(
                f"gather_and_generate: ranks that share an engine must ask alike, and one asks for {asked[0][1]}, another for "
                f"{differing[0]}"
            )
        everything = [prompt for rank_prompts, _ in asked for prompt in rank_prompts]
        completions = self._completions_of_group(everything, sampling)
        place = dist.get_rank(self.mp_group)
        start = sum(len(rank_prompts) for rank_prompts, _ in asked[:place]) * sampling.n
        return completions[start : start + len(prompts) * sampling.n]

    def _completions_of_group(self, prompts: list[Prompt], sampling: Sampling) -> list[Completion]:
        """The completions of all prompts of the ranks that share an engine, on each of them."""
        if self.engine is not None and not getattr(self.engine, "leader_only", False):
            return self.generate_local(prompts, sampling)
        outcome: list[list[Completion] | None] = [None]
        try:
            if self.engine is not None:
                outcome = [self.generate_local(prompts, sampling)]
        finally:  # the ranks that hold no engine are waiting, also where it failed
            leader = dist.get_global_rank(self.mp_group, 0) if self.mp_group is not None else 0
            dist.broadcast_object_list(outcome, src=leader, group=self.mp_group)
        if outcome[0] is None:
            raise EngineError("gather_and_generate: the rank that holds this rank's engine failed; see its own error")
        return outcome[0]
