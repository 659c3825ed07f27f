"""Defects of weight syncs: buckets, buffers and versions."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from typing_extensions import override

from lightrft.conformance.saboteurs.catalogue import saboteur
from lightrft.strategy import FakeStrategy
from lightrft.strategy.models.weight_stream import Bucket
from lightrft.strategy.rollout.fake_engine import FakeEngine

# mypy: disable-error-code="misc, union-attr, arg-type"


@saboteur("SYNC-7")
class BucketsOfHalves(FakeStrategy):
    """Buckets are measured in bf16, whatever dtype was asked for."""

    def full_parameters(
        self, model: nn.Module, bucket_bytes: int | None = None, dtype: torch.dtype | None = None
    ) -> Iterator[list[tuple[str, torch.Tensor]]]:
        halves = dtype == torch.float32 and bucket_bytes is not None
        return super().full_parameters(model, 2 * bucket_bytes if halves and bucket_bytes else bucket_bytes, dtype)


@saboteur("SYNC-4")
class CountsFailures(FakeEngine):
    """A failed sync increases weight_version."""

    @override
    def _load(self, buckets: Iterator[Bucket]) -> None:
        try:
            super()._load(buckets)
        except BaseException:
            self._version += 1
            raise


@saboteur("SYNC-7")
class BucketsOfStoredBytes(FakeStrategy):
    """Buckets are measured in the dtype of the weights, if the dtype asked for is wider."""

    def full_parameters(
        self, model: nn.Module, bucket_bytes: int | None = None, dtype: torch.dtype | None = None
    ) -> Iterator[Bucket]:
        if bucket_bytes is not None and dtype is torch.float64:
            bucket_bytes *= 2
        return super().full_parameters(model, bucket_bytes, dtype)


@saboteur("SYNC-1")
class BuffersOfTheFirstSync(FakeStrategy):
    """Buffers reach the engine with the first sync only."""

    def update_engine_weights(self, actor: nn.Module) -> None:
        engine: Any = self.inference_engine
        module = getattr(getattr(engine, "_model", None), "module", nn.Module())
        kept = {name: buffer.clone() for name, buffer in module.named_buffers() if engine.weight_version}
        super().update_engine_weights(actor)
        for name, buffer in module.named_buffers():
            buffer.copy_(kept.get(name, buffer))
