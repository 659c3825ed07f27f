"""Defects of preparing, offloading, and of the weight stream."""

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn
from typing_extensions import override

from lightrft.conformance.saboteurs.catalogue import saboteur
from lightrft.conformance.saboteurs.plain import PlainStrategy
from lightrft.strategy import FakeStrategy
from lightrft.strategy.backend import WrapOptions
from lightrft.strategy.training.trained_model import TrainedModel

# mypy: disable-error-code="misc"


@saboteur("PREP-1")
class AlwaysTuples(FakeStrategy):
    """A single argument comes back in a tuple."""

    def prepare(self, *models: Any, is_rlhf: bool = False) -> Any:
        result = super().prepare(*models)
        return (result,) if len(models) == 1 else result


@saboteur("PREP-1")
class DropsNone(FakeStrategy):
    """None among the arguments is left out."""

    def prepare(self, *models: Any, is_rlhf: bool = False) -> Any:
        kept = [model for model in models if model is not None]
        return super().prepare(*kept) if kept else None


@saboteur("PREP-2")
class UnwrapsTooFar(FakeStrategy):
    """Unwrapping twice gives a part of the model."""

    _seen: set[int] = set()

    def unwrap_model(self, model: nn.Module) -> nn.Module:
        inner = super().unwrap_model(model)
        if id(inner) in self._seen and model is inner:
            return next(inner.children(), inner)
        self._seen.add(id(inner))
        return inner


@saboteur("PREP-2")
class DoesNotUnwrap(FakeStrategy):
    """Actors are not unwrapped."""

    def unwrap_model(self, model: nn.Module) -> nn.Module:
        return model


@saboteur("PREP-3")
class ComputesInHalf(FakeStrategy):
    """fp32 models compute in bf16."""

    @override
    def _forward_context(self, module: nn.Module, options: WrapOptions) -> AbstractContextManager[object]:
        return torch.autocast("cpu", torch.bfloat16)


@saboteur("PREP-3")
class DropsWhatItPrepares(FakeStrategy):
    """Preparing scales the head of a language model a little."""

    @override
    def _wrap(self, module: nn.Module, options: WrapOptions) -> nn.Module:
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                if name.endswith("norm.weight"):
                    parameter.mul_(1.0001)
        return super()._wrap(module, options)


@saboteur("PREP-4", world=2)
class EachItsOwn(PlainStrategy):
    """Every rank keeps the weights that it built."""

    @override
    def _wrap(self, module: nn.Module, options: WrapOptions) -> nn.Module:
        return module.to(self.world.device)


@saboteur("PREP-4", world=2)
class BiasesTheirOwn(PlainStrategy):
    """The first bias stays each rank's own."""

    @override
    def _wrap(self, module: nn.Module, options: WrapOptions) -> nn.Module:
        own = {name: p.detach().clone() for name, p in module.named_parameters() if name.endswith("bias")}
        super()._wrap(module, options)
        for name, parameter in module.named_parameters():
            if name in list(own)[:1]:
                parameter.data.copy_(own[name])
        return module


@saboteur("PREP-5")
class TrainsTheReference(FakeStrategy):
    """Updates leak a little into models that were prepared for inference."""

    @override
    def _update(self, trained: TrainedModel, factor: float) -> float:
        norm = super()._update(trained, factor)
        for other in self._models:
            if not other.options.training:
                for own, parameter in zip(other.module.parameters(), trained.model.parameters(), strict=False):
                    if own.shape == parameter.shape:
                        own.data.lerp_(parameter.data, 1e-3)
        return norm


@saboteur("PREP-6", world=2)
class LeavesBuffers(PlainStrategy):
    """After a meta init, buffers on other ranks than 0 are whatever was in memory."""

    @override
    def _wrap(self, module: nn.Module, options: WrapOptions) -> nn.Module:
        was_meta = any(buffer.is_meta for buffer in module.buffers())
        super()._wrap(module, options)
        for buffer in module.buffers():
            if was_meta:
                buffer.fill_(float("nan"))
        return module


@saboteur("PREP-6")
class BuildsAnother(FakeStrategy):
    """The context changes the seed."""

    @contextmanager
    def init_model_context(self, meta_init: bool = False) -> Iterator[None]:
        yield
        if meta_init:
            self._shift = True

    @override
    def _wrap(self, module: nn.Module, options: WrapOptions) -> nn.Module:
        if getattr(self, "_shift", False):
            next(module.parameters()).data.add_(1e-4)
        return super()._wrap(module, options)


@saboteur("PREP-7")
class LosesTheCritic(FakeStrategy):
    """Where there is no critic, None stands for the three."""

    def prepare_models_and_optimizers(self, *arguments: Any, **more: Any) -> Any:
        actor, critic, rewards, initial = super().prepare_models_and_optimizers(*arguments, **more)
        return actor, critic if critic[0] is not None else None, rewards, initial


@saboteur("PREP-7")
class NoWarmUp(FakeStrategy):
    """The schedule of the whole set begins at the peak."""

    def prepare_models_and_optimizers(self, *arguments: Any, **more: Any) -> Any:
        result = super().prepare_models_and_optimizers(*arguments, **more)
        for group in result[0][1].param_groups:
            group["lr"] = self.config.actor_learning_rate
        return result


@saboteur("PREP-8")
class NewOptimizer(FakeStrategy):
    """prepare gives back an optimizer of its own."""

    def prepare(self, *models: Any, is_rlhf: bool = False) -> Any:
        result = super().prepare(*models)
        if isinstance(result, tuple) and len(result) == 3 and isinstance(result[1], torch.optim.Optimizer):
            return result[0], copy.copy(result[1]), result[2]
        return result


@saboteur("PREP-8")
class WrapFirstForgets(FakeStrategy):
    """Wrapping first loses weight decay."""

    @override
    def _bind(self, trained: TrainedModel) -> None:
        if trained.scheduler is None and not self._prepared_together:
            for group in trained.optimizer.param_groups:
                group["eps"] = 1e-4

    _prepared_together = False

    def prepare(self, *models: Any, is_rlhf: bool = False) -> Any:
        self._prepared_together = True
        try:
            return super().prepare(*models)
        finally:
            self._prepared_together = False


# The weight stream


class Bending(FakeStrategy):
    """A strategy whose weight stream is easy to bend."""

    def full_parameters(self, model: Any, bucket_bytes: Any = None, dtype: Any = None) -> Any:
        for bucket in super().full_parameters(model, bucket_bytes, dtype):
            yield self.bent(bucket)

    def bent(self, bucket: list[Any]) -> list[Any]:
        """The bucket as it is."""
        return bucket


@saboteur("SYNC-7")
class OneBucket(FakeStrategy):
    """The size of a bucket is ignored."""

    def full_parameters(self, model: Any, bucket_bytes: Any = None, dtype: Any = None) -> Any:
        return super().full_parameters(model, 1 << 30, dtype)


@saboteur("SYNC-7")
class TiedTwice(FakeStrategy):
    """Tied weights come twice."""

    def full_parameters(self, model: Any, bucket_bytes: Any = None, dtype: Any = None) -> Any:
        for bucket in super().full_parameters(model, bucket_bytes, dtype):
            yield [
                pair
                for name, tensor in bucket
                for pair in [(name, tensor), *([("head.weight", tensor)] if name == "embedding.weight" else [])]
            ]


@saboteur("SYNC-7")
class OtherNames(Bending):
    """Names carry a wrapper's prefix."""

    def bent(self, bucket: list[Any]) -> list[Any]:
        return [(f"module.{name}", tensor) for name, tensor in bucket]


@saboteur("SYNC-7")
class LeavesBuffersOut(Bending):
    """Persistent buffers are left out."""

    def bent(self, bucket: list[Any]) -> list[Any]:
        return [(name, tensor) for name, tensor in bucket if name != "offset"]


# Offloading


@saboteur("OFF-1")
class RoundsState(FakeStrategy):
    """Reloading the optimizer rounds its state to bf16."""

    @override
    def _move_optimizer(self, trained: TrainedModel, device: torch.device) -> None:
        super()._move_optimizer(trained, device)
        for state in trained.optimizer.state.values():
            state["exp_avg"].copy_(state["exp_avg"].bfloat16())


@saboteur("OFF-1")
class ForgetsState(FakeStrategy):
    """Offloading twice forgets the optimizer's state."""

    def maybe_offload_optimizer(self, optimizer: Any) -> Any:
        found = self._models.owner(optimizer)
        if found is not None and found.trained is not None and found.trained.optimizer_offloaded:
            optimizer.state.clear()
        return super().maybe_offload_optimizer(optimizer)


@saboteur("OFF-2")
class ResetsSteps(FakeStrategy):
    """An update after offloading begins Adam's count anew."""

    @override
    def _load_optimizer(self, trained: TrainedModel, device: Any = None) -> None:
        super()._load_optimizer(trained, device)
        for state in trained.optimizer.state.values():
            state["step"].zero_()


@saboteur("OFF-2")
class LosesGradients(FakeStrategy):
    """Reloading a model drops its frozen flags and its momentum."""

    @override
    def _move_model(self, module: nn.Module, device: torch.device) -> None:
        super()._move_model(module, device)
        found = self._models.find(module)
        if found is not None and found.trained is not None:
            for state in found.trained.optimizer.state.values():
                state["exp_avg"].zero_()
