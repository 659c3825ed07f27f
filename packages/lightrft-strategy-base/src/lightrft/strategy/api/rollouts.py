"""Generating from a model in training."""

from collections.abc import Iterator, Sequence
from typing import Any, final

import torch
import torch.distributed as dist
from torch import nn

from lightrft.config import StrategyError
from lightrft.strategy.api.checkpointing import Checkpointing
from lightrft.strategy.export import for_engines
from lightrft.strategy.export.adapters import has_adapters
from lightrft.strategy.rollout import multimodal, weights
from lightrft.strategy.rollout.engine import Completion, RolloutEngine
from lightrft.strategy.rollout.rollout import EngineStatus
from lightrft.strategy.rollout.sampling import Sampling
from lightrft.strategy.training.modules import skeleton_with_buffers


class Rollouts(Checkpointing):
    """The engine, the weights that go to it, and the completions that come back."""

    # Weights

    @final
    def full_parameters(
        self, model: nn.Module, bucket_bytes: int | None = None, dtype: torch.dtype | None = None
    ) -> Iterator[list[tuple[str, torch.Tensor]]]:
        """Yield the whole parameters and persistent buffers of a prepared model, a bucket at a time, on every rank.

        Names and form are those that ``save_pretrained`` writes, tied tensors once. Floating ones come in
        ``dtype``, by default that in which the model computes. A bucket holds at most ``bucket_bytes``
        (default: the setting), or one larger tensor, and is valid until the next one is asked for; it may be
        the model's own memory. All ranks must ask for all buckets.
        """
        found = self._models.at_hand(model, "full_parameters")
        limit = self.config.weight_sync_bucket_bytes if bucket_bytes is None else bucket_bytes
        yield from self._flowing(weights.full_parameters(self, found.module, limit, self._type_sent(dtype)))

    def _type_sent(self, asked: torch.dtype | None) -> torch.dtype | None:
        return asked or (torch.bfloat16 if self.config.bf16 else None)

    def _flowing(self, buckets: Iterator[weights.Bucket]) -> Iterator[weights.Bucket]:
        while True:
            with self._running("full_parameters"):
                bucket = next(buckets, None)
            if bucket is None:
                return
            yield bucket
            bucket.clear()  # whoever still holds the list must not keep its tensors while the next ones are gathered

    # Rollout

    @property
    def inference_engine(self) -> RolloutEngine | None:
        """The rollout engine, or None: before `setup_inference_engine`, and where another rank holds it."""
        return self._rollout.engine

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
        """The ranks that have this rank's place in the other engines; None without a process group."""
        return self._rollout.dp_group

    @final
    def setup_inference_engine(
        self, args: object = None, engine_type: str | None = None, actor: nn.Module | None = None
    ) -> RolloutEngine | None:
        """Build the rollout engine, give it ``actor``'s weights, and let it sleep if it may.

        ``args``: settings of the engine where they differ from this strategy's, with ``pretrain``, the model's
        path. ``engine_type``: a registered name, by default the setting.

        Raises `ConfigError` or `BackendNotInstalledError` for an engine that is not there.
        """
        config = self._config_of(args)
        with self._running("setup_inference_engine"):
            self._rollout.setup(
                config.engine_type if engine_type is None else engine_type, config, lambda: self._skeleton_of(actor)
            )
        if actor is not None:
            self.update_engine_weights(actor)
        self.maybe_sleep_inference_engine()
        return self._rollout.engine

    def _skeleton_of(self, actor: nn.Module | None) -> nn.Module | None:
        found = None if actor is None else self._models.find(actor)
        if actor is not None and (found is None or found.skeleton is None):
            raise StrategyError("setup_inference_engine: the actor must be prepared for training first")
        if found is None or found.skeleton is None:
            return None
        skeleton = skeleton_with_buffers(found.skeleton, found.module)
        return for_engines.without_adapters(skeleton) if has_adapters(found.module) else skeleton

    @final
    def maybe_sleep_inference_engine(self) -> None:
        """Put the engine to sleep, where there is one and ``enable_engine_sleep`` is set."""
        with self._running("maybe_sleep_inference_engine"):
            self._rollout.sleep()

    @final
    def wakeup_inference_engine(self) -> None:
        """Wake the engine, where there is one. Generating and syncing do so by themselves."""
        with self._running("wakeup_inference_engine"):
            self._rollout.wake()

    @final
    def update_engine_weights(self, actor: nn.Module) -> None:
        """Send all weights of ``actor``, and of no other model, to the engine; without one, say so and do nothing.

        Of a model with PEFT adapters go those of its base model, with the active adapters merged in.

        Raises `EngineError` before the engine is touched where the actor's names or shapes are not those of the
        engine's checkpoint. Where sending fails, the engine is stale, and refuses to generate, until a sync ends well.
        """
        with self._running("update_engine_weights"):
            found = self._models.at_hand(actor, "update_engine_weights")
            limit, dtype = self._rollout.bucket_bytes, torch.bfloat16 if self._rollout.bf16 else None
            if has_adapters(found.module):
                whole, skeleton = found.module, found.skeleton or found.module
                self._rollout.sync(
                    lambda: for_engines.merged_shapes(self, whole, skeleton),
                    lambda: self._flowing(
                        for_engines.merged_parameters(self, whole, skeleton, limit, self._type_sent(dtype))
                    ),
                )
            else:
                self._rollout.sync(
                    lambda: weights.full_shapes(self, found.module),
                    lambda: self.full_parameters(actor, limit, dtype=dtype),
                )

    @final
    def engine_generate_local(
        self, sampling_params: Any, prompt_token_ids: Sequence[Any] | None = None,
        multi_modal_inputs: Sequence[dict[str, Any]] | None = None,
    ) -> list[Completion]:  # fmt: skip
        """Complete prompts on this rank's engine; other ranks need not call. Wakes the engine.

        Give token ids, or LightRFT's ``{"prompt": ..., "multi_modal_data": ...}`` dicts: `ArgumentError` for neither or both.
        """
        with self._running("engine_generate_local"):
            prompts = multimodal.one_kind_of_prompts(prompt_token_ids, multi_modal_inputs)
            return self._rollout.generate_local(prompts, Sampling.of(sampling_params))

    @final
    def gather_and_generate(
        self, sampling_params: Any, all_prompt_token_ids: Sequence[Any] | None = None, all_prompts: Sequence[str] | None = None,
        all_images: Sequence[Any] | None = None, sleep_engine: bool = True, images_num: Sequence[int] | None = None,
        all_videos: Sequence[Any] | None = None, videos_num: Sequence[int] | None = None,
    ) -> list[Completion]:  # fmt: skip
        """Complete this rank's own prompts, whatever their number on each rank, with the engine or its share of one.

        ``sampling_params``: a `Sampling`, a dict, or vLLM's ``SamplingParams``; with n samples, n in a row for
        each prompt. Images and videos come nested, or flat with counts. Wakes the engine, and afterwards lets
        it sleep if ``sleep_engine``. Raises on every rank where one fails.
        """
        with self._running("gather_and_generate"):
            return self._rollout.gather_and_generate(
                lambda: multimodal.build_prompts(
                    all_prompt_token_ids, all_prompts, all_images, images_num, all_videos, videos_num
                ),
                lambda: Sampling.of(sampling_params),
                sleep_engine,
            )
