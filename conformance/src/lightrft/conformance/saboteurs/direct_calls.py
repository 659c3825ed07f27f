"""Defects in handling a script's direct changes to a prepared model, and in stepping the script's own optimizer."""

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from lightrft.config import StrategyConfig
from lightrft.conformance.saboteurs.catalogue import saboteur
from lightrft.strategy import FakeStrategy
from lightrft.strategy.backend import GradientShards, TrainedModel, World
from lightrft.strategy.fake_strategy import FakeBackend
from lightrft.strategy.step.update import reduce_clip_and_step

# mypy: disable-error-code="misc"


class Unguarded(FakeStrategy):
    """A strategy that removes guards from the optimizers of models in training."""

    def prepare(self, *models: object, is_rlhf: bool = False) -> Any:
        result = super().prepare(*models)
        for prepared in self._models:
            if prepared.trained is not None:
                self.unguard(prepared.trained)
        return result

    def unguard(self, trained: TrainedModel) -> None:
        """Remove a guard from the optimizer."""


@saboteur("PREP-14")
class ZeroGradDiscards(Unguarded):
    """optimizer.zero_grad within an update discards what was accumulated."""

    @override
    def unguard(self, trained: TrainedModel) -> None:
        def zero_grad(set_to_none: bool = True) -> None:
            for parameter in trained.parameters:
                parameter.grad = None
            trained.gradients_seen = [(None, 0) for _ in trained.gradients_seen]

        vars(trained.optimizer)["zero_grad"] = zero_grad


@saboteur("PREP-14")
class UnguardedStep(Unguarded):
    """optimizer.step bypasses the strategy and steps with gradients that are not clipped."""

    @override
    def unguard(self, trained: TrainedModel) -> None:
        trained.optimizer._optimizer_step_pre_hooks.clear()


@saboteur("PREP-14")
class GroupsAddedLater(Unguarded):
    """A group that is added later is stepped, but is not in the norm, not clipped and never cleared."""

    @override
    def unguard(self, trained: TrainedModel) -> None:
        def add_param_group(group: dict[str, Any]) -> None:
            Optimizer.add_param_group(trained.optimizer, group)
            trained.group_sizes.append(len(group["params"]))

        vars(trained.optimizer)["add_param_group"] = add_param_group


class StepsPieces(FakeBackend):
    """A backend whose optimizer steps pieces of the parameters: views of their memory."""

    def __init__(self, config: StrategyConfig, world: World) -> None:
        super().__init__(config, world)
        self._pieces: dict[TrainedModel, list[tuple[nn.Parameter, nn.Parameter, slice]]] = {}

    def pieces(self, parameter: nn.Parameter) -> list[slice]:
        """Return the ranges of the flattened parameter."""
        raise NotImplementedError

    def shape(self, parameter: nn.Parameter) -> tuple[int, ...]:
        """Return the shape of a piece."""
        raise NotImplementedError

    @override
    def bind(self, trained: TrainedModel) -> None:
        made: list[tuple[nn.Parameter, nn.Parameter, slice]] = []
        for group in trained.optimizer.param_groups:
            pieces = [
                (nn.Parameter(p.data.view(-1)[part].view(self.shape(p))), p, part)
                for p in group["params"]
                for part in self.pieces(p)
            ]
            group["params"] = [piece for piece, _, _ in pieces]
            made += pieces
        self._pieces[trained] = made

    @override
    def gradient_shards(self, trained: TrainedModel) -> list[GradientShards]:
        for piece, parameter, part in self._pieces[trained]:
            assert parameter.grad is not None
            piece.grad = parameter.grad.view(-1)[part].view(piece.shape)
        return list(super().gradient_shards(trained))


@saboteur("PREP-15")
class StepsFlat(StepsPieces):
    """The optimizer gets flattened parameters."""

    @override
    def pieces(self, parameter: nn.Parameter) -> list[slice]:
        return [slice(None)]

    @override
    def shape(self, parameter: nn.Parameter) -> tuple[int, ...]:
        return (-1,)


@saboteur("PREP-15")
class StepsRows(StepsPieces):
    """The optimizer gets each row of a parameter as a separate parameter."""

    @override
    def pieces(self, parameter: nn.Parameter) -> list[slice]:
        size = parameter[0].numel()
        return [slice(row * size, (row + 1) * size) for row in range(len(parameter))]

    @override
    def shape(self, parameter: nn.Parameter) -> tuple[int, ...]:
        return (1, *parameter.shape[1:])


@saboteur("PREP-16")
class UndoesWrites(FakeBackend):
    """An update starts from the weights after the previous one, and overwrites what a script wrote."""

    def __init__(self, config: StrategyConfig, world: World) -> None:
        super().__init__(config, world)
        self._masters: dict[TrainedModel, list[torch.Tensor]] = {}

    @override
    def bind(self, trained: TrainedModel) -> None:
        self._masters[trained] = [parameter.detach().clone() for parameter in trained.parameters]

    @override
    def fused_step(self, trained: TrainedModel, factor: float) -> float:
        for parameter, master in zip(trained.parameters, self._masters[trained], strict=True):
            parameter.data.copy_(master)
        norm = reduce_clip_and_step(self, trained, factor)
        self.bind(trained)
        return norm
