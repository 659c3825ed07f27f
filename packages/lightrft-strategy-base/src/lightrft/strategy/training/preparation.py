"""Preparing models: from what the caller built to what the backend trains.

One path works everywhere: build the model, create_optimizer, build the schedule, prepare the three together.
Where wrapping replaces parameters, the caller's own optimizer is pointed at the new ones by name. Wrapping
first and creating the optimizer afterwards works everywhere too.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lightrft.config import ArgumentError, StrategyError
from lightrft.strategy.backend import Backend, WrapOptions
from lightrft.strategy.distributed.collectives import Collectives
from lightrft.strategy.distributed.operations import Operations
from lightrft.strategy.rollout import saved_form
from lightrft.strategy.training.modules import (
    check_actor,
    check_materialized,
    guard_forward,
    inner_model,
    raise_precision,
    schema_of,
    skeleton,
)
from lightrft.strategy.training.optimizers import check_belongs, check_kinds, check_steps, rebind
from lightrft.strategy.training.prepared import PreparedModel, PreparedModels
from lightrft.strategy.training.trained_model import TrainedModel


class Preparation:
    """Prepares models for one backend."""

    def __init__(
        self, backend: Backend, models: PreparedModels, operations: Operations, collectives: Collectives, window: int
    ) -> None:
        self._backend, self._models, self._window = backend, models, window
        self._operations, self._collectives = operations, collectives

    def prepare(self, argument: Any) -> Any:
        """One argument of `StrategyBase.prepare`, in the structure in which it came."""
        if argument is None:
            return None
        if isinstance(argument, nn.Module):
            return self.model(argument, WrapOptions(training=False))
        if _is_training_triple(argument):
            return self.triple(*argument)
        if isinstance(argument, (list, tuple)):
            items = [self.prepare(item) for item in argument]
            return type(argument)(*items) if hasattr(argument, "_fields") else type(argument)(items)
        raise ArgumentError(
            f"prepare: got {argument!r} ({type(argument).__name__}); wanted a model, (model, optimizer, scheduler), a list "
            f"of models, or None"
        )

    def triple(self, model: nn.Module | None, optimizer: Any, scheduler: Any) -> tuple[Any, Any, Any]:
        """``(model, optimizer, scheduler)`` for training; the optimizer and the scheduler are the caller's own."""
        if model is None:
            return None, optimizer, scheduler
        if optimizer is None:
            return self.model(model, WrapOptions(training=True)), None, scheduler
        check_kinds("prepare", model, optimizer)
        inner = self._models.unwrap(model)
        self._check_free(optimizer, inner)
        check_belongs(optimizer, inner, "prepare")
        names = {id(parameter): name for name, parameter in inner.named_parameters()}
        wrapped = self.model(model, WrapOptions(training=True))
        rebind(optimizer, names, inner)
        self.bind(model, optimizer).scheduler = scheduler
        return wrapped, optimizer, scheduler

    def model(self, model: nn.Module, options: WrapOptions) -> nn.Module:
        """Wrap ``model``; one that is wrapped already is returned as it is."""
        found = self._models.find(model)
        if found is not None:
            if found.options.training != options.training:
                raise StrategyError(
                    f"prepare: {type(model).__name__} was prepared for "
                    f"{'training' if found.options.training else 'inference'} already; use a copy for the other"
                )
            return model
        inner = inner_model(model)
        with self._collectives.together("prepare"):
            if options.training:
                check_actor(model)
            check_materialized(inner, self._backend.world)
            self._backend._check_model(inner, options)
        if options.training:
            raise_precision(inner)
        else:
            inner.eval().requires_grad_(False)
        self._collectives.agree_on_all("prepare", schema_of(inner))
        saved_form.remember(inner)
        kind, copy = type(inner), skeleton(inner) if options.training else None
        with self._backend.world.remembering_environment():
            wrapped = self._backend._wrap(inner, options)
        self._backend.world.impose_timeout()
        self._add(PreparedModel(module=inner, kind=kind, wrapped=wrapped, options=options, skeleton=copy))
        if inner is model:
            return wrapped
        model.model = wrapped
        return model

    def bind(self, model: nn.Module, optimizer: Optimizer) -> TrainedModel:
        """Put a wrapped ``model`` in training with ``optimizer``, which holds its parameters as they are now."""
        found = self._models.find(model)
        assert found is not None
        check_belongs(optimizer, found.module, "prepare")
        check_steps(optimizer, "prepare")
        names = {id(parameter): name for name, parameter in found.module.named_parameters()}
        found.trained = TrainedModel(self._backend, found.module, found.kind, optimizer, names, self._window)
        with self._backend.world.remembering_environment():
            self._backend._bind(found.trained)
        self._backend.world.impose_timeout()
        return found.trained

    def adopt(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Take a bare model and optimizer into training as they are, for backends that replace nothing."""
        inner = inner_model(model)
        check_belongs(optimizer, inner, "backward")
        if self._models.find(model) is None:
            copy = skeleton(inner)
            self._models.add(
                PreparedModel(
                    module=inner, kind=type(inner), wrapped=inner, options=WrapOptions(training=True), skeleton=copy
                )
            )
        self.bind(model, optimizer)

    def _check_free(self, optimizer: Optimizer, module: nn.Module) -> None:
        for found in (self._models.owner(optimizer), self._models.find(module)):
            if found is not None and found.trained is not None:
                raise StrategyError(
                    f"prepare: {found.kind.__name__} is in training already with its {type(found.trained.optimizer).__name__}; "
                    f"prepare a model and its optimizer once, and use what prepare returned"
                )

    def _add(self, prepared: PreparedModel) -> None:
        prepared.unguard = guard_forward(prepared.wrapped, lambda: self._forward(prepared))
        self._models.add(prepared)

    @contextmanager
    def _forward(self, prepared: PreparedModel) -> Iterator[None]:
        """Around every forward of a prepared model."""
        if prepared.offloaded:
            raise StrategyError(f"forward: {prepared.kind.__name__} was offloaded; call reload_model before using it")
        with self._operations.running("forward"), self._backend._forward_context(prepared.module, prepared.options):
            yield


def _is_training_triple(argument: object) -> bool:
    """Whether this is (model, optimizer, scheduler), any of which may be None, and not several models."""
    return (
        isinstance(argument, tuple)
        and len(argument) == 3
        and (argument[0] is None or isinstance(argument[0], nn.Module))
        and not isinstance(argument[1], nn.Module)
        and not isinstance(argument[2], nn.Module)
        and (argument[0] is None or argument[1] is not None or argument[2] is None)
    )
