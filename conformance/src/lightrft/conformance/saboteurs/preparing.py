"""Defects of preparing models, and of the weight stream."""

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from lightrft.config import StrategyConfig, StrategyError
from lightrft.conformance.saboteurs.catalogue import saboteur
from lightrft.conformance.saboteurs.hooks import StreamHooks
from lightrft.strategy import FakeStrategy
from lightrft.strategy.backend import ReplicatedBackend, TrainedModel, World
from lightrft.strategy.backend.types import WrapOptions
from lightrft.strategy.fake_strategy import FakeBackend
from lightrft.strategy.models.weight_stream import Bucket
from lightrft.strategy.step.update import reduce_clip_and_step

# mypy: disable-error-code="misc"


@saboteur("PREP-1")
class AlwaysTuples(FakeStrategy):
    """A single argument comes back in a tuple."""

    def prepare(self, *models: object, is_rlhf: bool = False) -> Any:
        result = super().prepare(*models)
        return (result,) if len(models) == 1 else result


@saboteur("PREP-1")
class DropsNone(FakeStrategy):
    """None among the arguments is left out."""

    def prepare(self, *models: object, is_rlhf: bool = False) -> Any:
        kept = [model for model in models if model is not None]
        return super().prepare(*kept) if kept else None


@saboteur("PREP-2")
class UnwrapsTooFar(FakeStrategy):
    """Unwrapping twice returns a submodule."""

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


@saboteur("PREP-2")
class UnwrapCopies(FakeStrategy):
    """unwrap_model returns a copy, which training does not change."""

    def unwrap_model(self, model: nn.Module) -> nn.Module:
        return copy.deepcopy(super().unwrap_model(model))


@saboteur("PREP-2")
class CompiledNames(FakeStrategy):
    """unwrap_model returns the wrapper of torch.compile, whose parameters have other names."""

    def unwrap_model(self, model: nn.Module) -> nn.Module:
        return model if hasattr(model, "_orig_mod") else super().unwrap_model(model)


@saboteur("PREP-3")
class ComputesInHalf(FakeBackend):
    """Forward passes use bf16 although bf16 is off."""

    @override
    def forward_context(self, module: nn.Module, options: WrapOptions) -> AbstractContextManager[object]:
        return torch.autocast("cpu", torch.bfloat16)


@saboteur("PREP-3")
class ScalesNorms(FakeBackend):
    """Preparing multiplies the weights of norms by 1.0001."""

    @override
    def wrap(self, module: nn.Module, options: WrapOptions) -> nn.Module:
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                if name.endswith("norm.weight"):
                    parameter.mul_(1.0001)
        return super().wrap(module, options)


class PositionalOnly(nn.Module):
    """Calls the module that it wraps with positional arguments only."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    @override
    def forward(self, *arguments: object, **keywords: object) -> object:
        return self.module(*arguments)


@saboteur("PREP-3")
class KeywordsDropped(FakeBackend):
    """The wrapped model drops keyword arguments."""

    accepts_unprepared = False
    capabilities = frozenset({"rank_dependent_modules"})

    @override
    def wrap(self, module: nn.Module, options: WrapOptions) -> nn.Module:
        return PositionalOnly(super().wrap(module, options))


@saboteur("PREP-4", world=2)
class KeepsLocalWeights(ReplicatedBackend):
    """Every rank keeps the weights that it was built with."""

    @override
    def wrap(self, module: nn.Module, options: WrapOptions) -> nn.Module:
        return module.to(self.world.device)


@saboteur("PREP-4", world=2)
class KeepsLocalBias(ReplicatedBackend):
    """Every rank keeps the first bias that it was built with."""

    @override
    def wrap(self, module: nn.Module, options: WrapOptions) -> nn.Module:
        local = {name: p.detach().clone() for name, p in module.named_parameters() if name.endswith("bias")}
        super().wrap(module, options)
        for name, parameter in module.named_parameters():
            if name in list(local)[:1]:
                parameter.data.copy_(local[name])
        return module


@saboteur("PREP-5")
class TrainsTheReference(FakeBackend):
    """Each update moves models that were prepared for inference towards the trained model."""

    def __init__(self, config: StrategyConfig, world: World) -> None:
        super().__init__(config, world)
        self._inference: list[nn.Module] = []

    @override
    def wrap(self, module: nn.Module, options: WrapOptions) -> nn.Module:
        if not options.training:
            self._inference.append(module)
        return super().wrap(module, options)

    @override
    def fused_step(self, trained: TrainedModel, factor: float) -> float:
        norm = reduce_clip_and_step(self, trained, factor)
        for module in self._inference:
            for reference, parameter in zip(module.parameters(), trained.model.parameters(), strict=False):
                if reference.shape == parameter.shape:
                    reference.data.lerp_(parameter.data, 1e-3)
        return norm


@saboteur("PREP-10")
class DropoutInTheReference(FakeBackend):
    """Models prepared for inference stay in training mode."""

    @override
    def wrap(self, module: nn.Module, options: WrapOptions) -> nn.Module:
        return super().wrap(module, options).train()


@saboteur("PREP-10")
class NoDropoutInTraining(FakeBackend):
    """Reading the weights of a model in training leaves it in evaluation mode."""

    @override
    def reshard(self, module: nn.Module) -> None:
        module.eval()


@saboteur("PREP-6", world=2)
class LeavesBuffers(ReplicatedBackend):
    """After a meta init, buffers on ranks other than 0 are uninitialised."""

    @override
    def wrap(self, module: nn.Module, options: WrapOptions) -> nn.Module:
        was_meta = any(buffer.is_meta for buffer in module.buffers())
        super().wrap(module, options)
        for buffer in module.buffers():
            if was_meta:
                buffer.fill_(float("nan"))
        return module


@saboteur("PREP-6")
class BuildsAnother(FakeStrategy):
    """After a meta init, the first parameter of every model is 1e-4 too large."""

    class Shifting(FakeBackend):
        """Adds ``shift`` to the first parameter of every model."""

        shift = 0.0

        @override
        def wrap(self, module: nn.Module, options: WrapOptions) -> nn.Module:
            next(module.parameters()).data.add_(self.shift)
            return super().wrap(module, options)

    backend_class = Shifting

    @contextmanager
    def init_model_context(self, meta_init: bool = False) -> Iterator[None]:
        yield
        if meta_init:
            self.backend.shift = 1e-4  # type: ignore[attr-defined]


@saboteur("PREP-6")
class OneMetaInit(FakeStrategy):
    """A meta init inside another is refused, as by patches that cannot be nested."""

    inside = False

    @contextmanager
    def init_model_context(self, meta_init: bool = False) -> Iterator[None]:
        if meta_init and self.inside:
            raise StrategyError("init_model_context: expected no other one around it, got one. Leave it first")
        self.inside = meta_init
        try:
            with super().init_model_context(meta_init):
                yield
        finally:
            self.inside = False


@saboteur("PREP-7")
class LosesTheCritic(FakeStrategy):
    """Without a critic, None is returned in place of (None, None, None)."""

    def prepare_models_and_optimizers(self, *arguments: Any, **more: Any) -> Any:
        actor, critic, rewards, initial = super().prepare_models_and_optimizers(*arguments, **more)
        return actor, critic if critic[0] is not None else None, rewards, initial


@saboteur("PREP-7")
class NoWarmUp(FakeStrategy):
    """prepare_models_and_optimizers sets the actor's learning rate to its peak, without warm-up."""

    def prepare_models_and_optimizers(self, *arguments: Any, **more: Any) -> Any:
        result = super().prepare_models_and_optimizers(*arguments, **more)
        for group in result[0][1].param_groups:
            group["lr"] = self.config.actor_learning_rate
        return result


@saboteur("PREP-7")
class PreparesOnce(FakeStrategy):
    """An actor that prepare_model has prepared does not get an optimizer later."""

    def prepare_models_and_optimizers(self, *arguments: Any, **more: Any) -> Any:
        prepared = self._models.find(arguments[0]) is not None
        actor, *others = super().prepare_models_and_optimizers(*arguments, **more)
        return (actor[0], None, None) if prepared else actor, *others


@saboteur("PREP-8")
class NewOptimizer(FakeStrategy):
    """prepare returns a copy of the caller's optimizer."""

    def prepare(self, *models: object, is_rlhf: bool = False) -> Any:
        result = super().prepare(*models)
        if isinstance(result, tuple) and len(result) == 3 and isinstance(result[1], torch.optim.Optimizer):
            return result[0], copy.copy(result[1]), result[2]
        return result


@saboteur("PREP-8")
class WrapFirstForgets(FakeStrategy):
    """If prepare_model comes before create_optimizer, the optimizer's epsilon is 1e-4."""

    def create_optimizer(self, model: nn.Module, **settings: object) -> Optimizer:
        optimizer = super().create_optimizer(model, **settings)
        for group in optimizer.param_groups if self._models.find(model) else ():
            group["eps"] = 1e-4
        return optimizer


class SharingAccepted(FakeStrategy):
    """Accepts some models that share parameters."""

    def prepare(self, *models: object, is_rlhf: bool = False) -> Any:
        refused = self._models.check_unshared

        def check(module: nn.Module, call: str) -> None:
            if not self.accepts(module):
                refused(module, call)

        self._models.check_unshared = check  # type: ignore[method-assign]
        try:
            return super().prepare(*models)
        finally:
            self._models.check_unshared = refused  # type: ignore[method-assign]

    def accepts(self, module: nn.Module) -> bool:
        """Whether ``module`` is accepted, whatever it shares."""
        return True


@saboteur("PREP-13")
class SharesAnything(SharingAccepted):
    """Models that share parameters are prepared, and each changes the other."""


@saboteur("PREP-13")
class SharesWithReferences(SharingAccepted):
    """Models for inference may share parameters with the model in training, and move with it."""

    def prepare(self, *models: object, is_rlhf: bool = False) -> Any:
        self._inference = isinstance(models[0], nn.Module)
        return super().prepare(*models)

    @override
    def accepts(self, module: nn.Module) -> bool:
        return self._inference


@saboteur("PREP-13")
class SharesMemory(SharingAccepted):
    """Only parameters that are the same object are refused, not those that use the same memory."""

    @override
    def accepts(self, module: nn.Module) -> bool:
        prepared = {id(parameter) for entry in self._models for parameter in entry.module.parameters()}
        return not any(id(parameter) in prepared for parameter in module.parameters())


@saboteur("PREP-17")
class SavesShards(FakeBackend):
    """save_pretrained of a model in training writes half of its tensors."""

    @override
    def wrap(self, module: nn.Module, options: WrapOptions) -> nn.Module:
        module = super().wrap(module, options)
        if options.training and hasattr(module, "save_pretrained"):
            save, state_dict = module.save_pretrained, module.state_dict

            def half(folder: Path) -> None:
                save(folder, state_dict=dict(list(state_dict().items())[::2]))  # type: ignore[operator]

            vars(module)["save_pretrained"] = half
        return module


@saboteur("PREP-17")
class SavesNothing(FakeBackend):
    """save_pretrained of a model that was prepared for inference writes nothing, without an error."""

    @override
    def wrap(self, module: nn.Module, options: WrapOptions) -> nn.Module:
        module = super().wrap(module, options)
        if not options.training:
            vars(module)["save_pretrained"] = lambda folder: None
        return module


@saboteur("PREP-17")
class SavesWithoutRemedy(FakeBackend):
    """save_pretrained of a part of a model raises torch's own error."""

    @override
    def wrap(self, module: nn.Module, options: WrapOptions) -> nn.Module:
        module = super().wrap(module, options)
        for part in module.children():
            vars(part)["save_pretrained"] = self._fail
        return module

    def _fail(self, folder: Path) -> None:
        raise RuntimeError("Attempted to access the data pointer on an invalid python storage.")


# The weight stream


@saboteur("SYNC-7")
class OneBucket(FakeStrategy):
    """bucket_bytes is ignored."""

    def full_parameters(self, model: nn.Module, *arguments: Any, **more: Any) -> Iterator[Bucket]:
        return super().full_parameters(model, 1 << 30, more.get("dtype"))


@saboteur("SYNC-7")
class TiedTwice(StreamHooks):
    """Tied weights are yielded twice."""

    @override
    def bucket(self, bucket: Bucket) -> Bucket:
        return [*bucket, *(("head.weight", tensor) for name, tensor in bucket if name == "embedding.weight")]


@saboteur("SYNC-7")
class OtherNames(StreamHooks):
    """Names have a wrapper's prefix."""

    @override
    def bucket(self, bucket: Bucket) -> Bucket:
        return [(f"module.{name}", tensor) for name, tensor in bucket]


@saboteur("SYNC-7")
class LeavesBuffersOut(StreamHooks):
    """Persistent buffers are left out."""

    @override
    def bucket(self, bucket: Bucket) -> Bucket:
        return [(name, tensor) for name, tensor in bucket if name != "offset"]


@saboteur("PREP-11")
class ForgetsChanges(FakeBackend):
    """What an evaluation froze is frozen in the next update: changes made after a forward pass are lost, as in FSDP2."""

    _seen: dict[nn.Parameter, bool]

    @override
    def forward_context(self, module: nn.Module, options: WrapOptions) -> AbstractContextManager[object]:
        if not hasattr(self, "_seen"):
            self._seen = {parameter: parameter.requires_grad for parameter in module.parameters()}
        return super().forward_context(module, options)

    @override
    def reduce(self, trained: TrainedModel) -> None:
        for parameter, requires_grad in self.__dict__.pop("_seen", {}).items():
            parameter.requires_grad_(requires_grad)
        super().reduce(trained)


@saboteur("PREP-11")
class EvaluationDropsGradient(FakeBackend):
    """An evaluation drops the gradient of the update in progress."""

    @override
    def forward_context(self, module: nn.Module, options: WrapOptions) -> AbstractContextManager[object]:
        if not torch.is_grad_enabled():
            module.zero_grad()
        return super().forward_context(module, options)


@saboteur("PREP-12")
class DropsHooks(FakeBackend):
    """Parameters are replaced, without their gradient hooks."""

    @override
    def wrap(self, module: nn.Module, options: WrapOptions) -> nn.Module:
        for parameter in module.parameters():
            if parameter._backward_hooks is not None:
                parameter._backward_hooks.clear()
        return super().wrap(module, options)
