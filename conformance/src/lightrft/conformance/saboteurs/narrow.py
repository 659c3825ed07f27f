"""Defects that only one argument, value or combination of settings shows."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from typing_extensions import override

from lightrft.conformance.saboteurs.catalogue import saboteur
from lightrft.conformance.saboteurs.collectives import map_leaves
from lightrft.conformance.saboteurs.hooks import CollectiveHooks, Loaded, LoaderHooks
from lightrft.conformance.saboteurs.plain import PlainStrategy
from lightrft.strategy import Completion, FakeStrategy, Prompt, Sampling, StepResult
from lightrft.strategy.backend import ReplicatedBackend, TrainedModel, WrapOptions
from lightrft.strategy.checkpoint.checkpoint_items import Models
from lightrft.strategy.data.loaders import ResumableLoader
from lightrft.strategy.distributed.collectives import ReduceOp
from lightrft.strategy.fake_strategy import FakeBackend
from lightrft.strategy.models.weight_stream import Bucket
from lightrft.strategy.rollout.fake_engine import FakeEngine

# mypy: disable-error-code="misc"


@saboteur("COLL-1", world=2)
class LargestIsNotNegative(CollectiveHooks, PlainStrategy):
    """The maximum of integers starts at 0."""

    def all_reduce(self, data: object, op: ReduceOp = "mean") -> Any:
        result = super().all_reduce(data, op)
        integer = isinstance(result, torch.Tensor) and not result.is_floating_point()
        return result.clamp(min=0) if op == "max" and integer else result


@saboteur("COLL-1", world=2)
class LargestIntAsDouble(PlainStrategy):
    """The maximum of Python ints is computed in float64, which has 53 bits."""

    def all_reduce(self, data: Any, op: ReduceOp = "mean") -> Any:
        return (
            int(super().all_reduce(float(data), op))
            if isinstance(data, int) and op == "max"
            else super().all_reduce(data, op)
        )


@saboteur("COLL-4", world=2)
class GathersIntsAsDoubles(PlainStrategy):
    """Python ints are gathered in float64, which has 53 bits."""

    def all_gather(self, data: object) -> Any:
        return map_leaves(
            lambda leaf: (
                super(GathersIntsAsDoubles, self).all_gather(float(leaf)).long()
                if isinstance(leaf, int)
                else super(GathersIntsAsDoubles, self).all_gather(leaf)
            ),
            data,
        )


@saboteur("PREP-4", world=2)
class KeepsLocalFrozenWeights(ReplicatedBackend):
    """Frozen parameters of the ranks stay as each rank built them."""

    @override
    def wrap(self, module: nn.Module, options: WrapOptions) -> nn.Module:
        frozen = {name: p.detach().clone() for name, p in module.named_parameters() if not p.requires_grad}
        wrapped = super().wrap(module, options)
        for name, parameter in module.named_parameters() if options.training else ():
            parameter.data.copy_(frozen.get(name, parameter.data))
        return wrapped


@saboteur("PREP-9")
class FixedEps(FakeBackend):
    """A change of eps in param_groups has no effect."""

    @override
    def reduce(self, trained: TrainedModel) -> None:
        super().reduce(trained)
        for group in trained.optimizer.param_groups:
            group["eps"] = 1e-8


@saboteur("PREP-9")
class OneRateForAll(FakeBackend):
    """All parameter groups train with the learning rate of the last one."""

    @override
    def reduce(self, trained: TrainedModel) -> None:
        super().reduce(trained)
        for group in trained.optimizer.param_groups:
            group["lr"] = trained.optimizer.param_groups[-1]["lr"]


@saboteur("PREP-10")
class AveragesInEvaluation(FakeStrategy):
    """moving_average leaves the model in evaluation mode."""

    def moving_average(self, model: nn.Module, model_ema: nn.Module, *arguments: Any, **options: Any) -> None:
        super().moving_average(model, model_ema, *arguments, **options)
        model.eval()


@saboteur("PREP-10")
class LoadsIntoTraining(FakeStrategy):
    """load_ckpt leaves the models in training mode, also those prepared for inference."""

    def load_ckpt(self, model: Models, *arguments: Any, **options: Any) -> Loaded:
        loaded = super().load_ckpt(model, *arguments, **options)
        for each in model.values() if isinstance(model, Mapping) else [model]:
            self.unwrap_model(each).train()
        return loaded


@saboteur("DATA-3")
class OrderOfBatches(LoaderHooks, FakeStrategy):
    """The order of samples depends on the batch size."""

    @override
    def loader_made(self, loader: ResumableLoader) -> None:
        loader._sampler.seed += loader.batch_size or 0


@saboteur("OPT-2")
class OddUpdatesDivideByOneMore(FakeBackend):
    """An update of five or more micro-batches, an odd number, divides by one more."""

    @override
    def backward(self, trained: TrainedModel, loss: torch.Tensor, *, retain_graph: bool) -> None:
        steps = trained.accumulation_steps
        share = loss * (steps / (steps + 1)) if steps > 4 and steps % 2 else loss
        super().backward(trained, share, retain_graph=retain_graph)


@saboteur("OPT-15")
class OneModelResetsAllSkips(FakeStrategy):
    """An applied update of one model resets the count of skipped updates of all models."""

    def optimizer_step(
        self, optimizer: Any, model: nn.Module, scheduler: LRScheduler | None = None, name: str = "model",
        *, boundary: bool | None = None,
    ) -> StepResult:  # fmt: skip
        result = super().optimizer_step(optimizer, model, scheduler, name, boundary=boundary)
        for prepared in self._models if result.applied else ():
            if prepared.trained is not None:
                prepared.trained.skipped_in_a_row = 0
        return result


@saboteur("CKPT-1")
class ForgetsDecay(FakeStrategy):
    """A weight decay that was changed in param_groups is not restored."""

    def load_ckpt(self, model: Models, *arguments: Any, **options: Any) -> Loaded:
        prepared = [self._models.find(each) for each in (model.values() if isinstance(model, Mapping) else [model])]
        optimizers = [each.trained.optimizer for each in prepared if each is not None and each.trained is not None]
        decays = [[group.get("weight_decay") for group in optimizer.param_groups] for optimizer in optimizers]
        loaded = super().load_ckpt(model, *arguments, **options)
        for optimizer, values in zip(optimizers, decays, strict=True):
            for group, value in zip(optimizer.param_groups, values, strict=True):
                group["weight_decay"] = value
        return loaded


@saboteur("CKPT-3")
class NegativeZero(FakeStrategy):
    """In client_state, -0.0 becomes 0.0."""

    def load_ckpt(self, *arguments: Any, **options: Any) -> Loaded:
        path, state = super().load_ckpt(*arguments, **options)
        return path, _without_negative_zero(state)


def _without_negative_zero(value: object) -> Any:
    if isinstance(value, dict):
        return {key: _without_negative_zero(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_without_negative_zero, value))
    return value + 0.0 if isinstance(value, float) else value


@saboteur("CKPT-3")
class FlagsInTuples(FakeStrategy):
    """In a tuple of client_state, True becomes 1."""

    def load_ckpt(self, *arguments: Any, **options: Any) -> Loaded:
        path, state = super().load_ckpt(*arguments, **options)
        return path, {key: _flags_as_numbers(value) for key, value in state.items()}


def _flags_as_numbers(value: object) -> Any:
    return tuple(int(item) if isinstance(item, bool) else item for item in value) if isinstance(value, tuple) else value


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


@saboteur("GEN-1")
class NeedsPrompts(FakeEngine):
    """A rank without prompts raises."""

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        if not prompts:
            raise ValueError("generate: expected prompts, got none")
        return super().generate(prompts, sampling)


@saboteur("GEN-2")
class OneSampleOfEach(FakeEngine):
    """Without a seed, all samples of a prompt are the same."""

    @override
    def _generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        if sampling.seed is not None:
            return super()._generate(prompts, sampling)
        once = super()._generate(prompts, replace(sampling, n=1))
        return [completion for completion in once for _ in range(sampling.n)]


@saboteur("GEN-2")
class ShortSeeds(FakeEngine):
    """Only the low 16 bits of a seed count."""

    @override
    def _generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        seed = None if sampling.seed is None else sampling.seed % 2**16
        return super()._generate(prompts, replace(sampling, seed=seed))


@saboteur("GEN-9")
class OneFilterAtATime(FakeEngine):
    """With top_k, top_p is ignored."""

    @override
    def _generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        return super()._generate(prompts, replace(sampling, top_p=1.0) if sampling.top_k > 0 else sampling)


@saboteur("GEN-10")
class NegativePenaltyIgnored(FakeEngine):
    """A negative frequency penalty is ignored."""

    @override
    def _generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        frequency = max(0.0, sampling.frequency_penalty)
        return super()._generate(prompts, replace(sampling, frequency_penalty=frequency))
