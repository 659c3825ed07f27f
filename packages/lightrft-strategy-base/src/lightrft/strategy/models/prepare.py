"""Preparing models: from what the caller built to what the backend trains.

The same order works on every backend: build the model, create_optimizer, build the schedule, prepare the three together.
If wrapping replaces parameters, the caller's optimizer is rebound to the new ones by name. Wrapping first and creating
the optimizer afterwards works on every backend too.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightrft.config import ArgumentError, ArgumentTypeError, LightRFTError, StrategyError
from lightrft.config.validation import shown
from lightrft.strategy.backend.contract import Backend
from lightrft.strategy.backend.types import TrainedModel, WrapOptions, sizes_of_groups
from lightrft.strategy.distributed.operations import Operations
from lightrft.strategy.distributed.rank_consensus import RankConsensus
from lightrft.strategy.models import state_dict_adapter
from lightrft.strategy.models.compiled import compile_in_place, replace_inner
from lightrft.strategy.models.modules import (
    check_actor,
    check_attributes,
    check_gradients,
    check_materialized,
    meta_copy,
    refuse_rank_allocation,
    refuse_save_pretrained,
    schema_of,
    upcast_trainable,
    wrap_forward,
)
from lightrft.strategy.models.optimizers import check_belongs, check_kinds, check_steps, rebind
from lightrft.strategy.models.registry import ModelRegistry, PreparedModel, inner_model
from lightrft.strategy.models.sharing import ParameterMemory
from lightrft.strategy.parallel.sequence import SequenceParallel
from lightrft.strategy.step.gradients import check_zero_grad, guard_optimizer
from lightrft.strategy.telemetry.log import logger
from lightrft.strategy.tensors import is_dtensor


class Preparation:
    """Prepares models for one backend."""

    def __init__(
        self, backend: Backend, models: ModelRegistry, operations: Operations, consensus: RankConsensus,
        sequence_parallel: SequenceParallel, accumulation_steps: int,
    ) -> None:  # fmt: skip
        self._backend, self._models, self._accumulation_steps = backend, models, accumulation_steps
        self._operations, self._consensus, self._sequence_parallel = operations, consensus, sequence_parallel
        self._warned_of_unprepared = False

    def prepare(self, argument: Any) -> Any:
        """Prepare one argument of `StrategyBase.prepare`, and return it in the same structure."""
        if argument is None:
            return None
        if isinstance(argument, nn.Module):
            return self.model(argument, WrapOptions(training=False))
        if _is_training_triple(argument):
            return self.triple(*argument)
        if isinstance(argument, (list, tuple)):
            items = [self.prepare(item) for item in argument]
            return type(argument)(*items) if hasattr(argument, "_fields") else type(argument)(items)
        raise _refusal("prepare", argument)

    def check(self, call: str, arguments: Iterable[Any]) -> None:
        """Raise `ArgumentError`, before anything is prepared, unless `prepare` takes each of ``arguments``."""
        for argument in arguments:
            if isinstance(argument, (list, tuple)) and not _is_training_triple(argument):
                self.check(call, argument)
            elif not (argument is None or isinstance(argument, nn.Module) or _is_training_triple(argument)):
                raise _refusal(call, argument)

    def create_optimizer(self, model: nn.Module, settings: dict[str, Any]) -> Optimizer:
        """Create AdamW with ``settings``, and bind it to ``model`` if that is wrapped already. All ranks must call this."""
        with self._consensus.together("create_optimizer"):
            prepared = self._models.find(model)
            if prepared is not None and prepared.trained is not None:
                raise StrategyError(
                    f"create_optimizer: expected a model without an optimizer, got {prepared.class_name}, which has one. Use "
                    f"the existing optimizer"
                )
            if prepared is not None and not prepared.options.training:
                raise StrategyError(
                    f"create_optimizer: expected a model to train, got {prepared.class_name}, which was prepared for "
                    f"inference. Use a copy that is not prepared"
                )
            optimizer = self._make_optimizer(model, settings)
        if prepared is not None:
            self.bind(model, optimizer)
        return optimizer

    def _make_optimizer(self, model: nn.Module, settings: dict[str, Any]) -> Optimizer:
        try:
            return self._backend.create_optimizer(self._models.unwrap(model), **settings)
        except (TypeError, ValueError, LookupError) as error:
            if isinstance(error, LightRFTError):
                raise
            given = ", ".join(f"{name}={shown(value)}" for name, value in settings.items())
            kind = ArgumentTypeError if isinstance(error, TypeError) else ArgumentError
            raise kind(
                f"create_optimizer: expected settings of torch.optim.AdamW, got {given}: {error}. See its arguments"
            ) from error

    def triple(self, model: nn.Module | None, optimizer: Any, scheduler: Any) -> tuple[Any, Any, Any]:
        """Prepare ``(model, optimizer, scheduler)`` for training; the optimizer and the scheduler stay the caller's."""
        if model is None:
            return None, optimizer, scheduler
        if optimizer is None:
            return self.model(model, WrapOptions(training=True)), None, scheduler
        with self._consensus.together("prepare", "checking arguments"):
            check_kinds("prepare", model, optimizer)
            waiting = self._without_scheduler(model, optimizer)
            if waiting is not None and scheduler is not None:
                waiting.scheduler = scheduler
                return model, optimizer, scheduler
            inner = self._models.unwrap(model)
            self._check_free(optimizer, inner)
            is_new = self._models.find(model) is None
            if is_new:
                self._models.check_unshared(inner, "prepare")
            check_belongs(optimizer, inner, "prepare")
            check_steps(optimizer, "prepare")
        if is_new:
            compile_in_place(model, inner)
            names = {id(parameter): name for name, parameter in inner.named_parameters()}
            self._backend.undo_presharding(inner)
            rebind(optimizer, names, inner)
        with self._consensus.together("prepare", "trying the optimizer"):
            self._backend.check_optimizer(optimizer)
        names = {id(parameter): name for name, parameter in inner.named_parameters()}
        wrapped = self.model(model, WrapOptions(training=True))
        rebind(optimizer, names, inner)
        self.bind(model, optimizer).scheduler = scheduler
        return wrapped, optimizer, scheduler

    def model(self, model: nn.Module, options: WrapOptions) -> nn.Module:
        """Wrap ``model``, or return it unchanged if it is wrapped already. All ranks must call this."""
        prepared = self._models.find(model)
        if prepared is not None:
            if prepared.options.training != options.training:
                purpose = "training" if prepared.options.training else "inference"
                raise StrategyError(
                    f"prepare: expected a model that is new to this strategy, got {type(model).__name__}, which was "
                    f"prepared for {purpose} already. Use a copy for the other purpose"
                )
            return model
        inner = inner_model(model)
        # before `undo_presharding`, which would replace parameters of a prepared model
        with self._consensus.together("prepare"):
            self._models.check_unshared(inner, "prepare")
        compile_in_place(model, inner)
        self._backend.undo_presharding(inner)
        with self._consensus.together("prepare"):
            if options.training:
                check_actor(model)
            self._check_module(inner, options)
            meta_model = meta_copy(inner) if options.training else None
        return replace_inner(model, inner, self._wrap(inner, meta_model, options))

    def _check_module(self, module: nn.Module, options: WrapOptions) -> None:
        if options.training:
            check_gradients(module)
        check_materialized(module, self._backend.world)
        check_attributes(module)
        self._sequence_parallel.check_model(module)
        self._backend.check_model(module, options)

    def _wrap(self, module: nn.Module, meta_model: nn.Module | None, options: WrapOptions) -> nn.Module:
        """Wrap a checked ``module``, and register it."""
        model_class, memory = type(module), ParameterMemory(module)
        if meta_model is not None:
            upcast_trainable(module)
            upcast_trainable(meta_model)
        else:
            module.eval().requires_grad_(False)
            for trained in self._models.in_training:  # a moving average includes later updates only
                trained.averages[module] = trained.updates
        self._consensus.agree_by_digest("prepare", schema_of(module))
        state_dict_adapter.remember_conversions(module)
        with self._backend.world.remembering_environment():
            wrapped = self._backend.wrap(module, options)
        self._backend.world.set_group_timeouts()
        self._add(
            PreparedModel(
                module=module,
                model_class=model_class,
                wrapped=wrapped,
                options=options,
                meta_model=meta_model,
                memory=memory,
            )
        )
        return wrapped

    def bind(self, model: nn.Module, optimizer: Optimizer) -> TrainedModel:
        """Put a wrapped ``model`` in training with ``optimizer``, which holds its current parameters."""
        prepared = self._models.find(model)
        assert prepared is not None
        check_belongs(optimizer, prepared.module, "prepare")
        check_steps(optimizer, "prepare")
        trained = TrainedModel(prepared.module, prepared.model_class, optimizer, self._accumulation_steps)
        prepared.trained = trained
        with self._backend.world.remembering_environment():
            self._backend.bind(trained)
        self._backend.world.set_group_timeouts()
        trained.group_sizes = sizes_of_groups(optimizer)
        prepared.undo.callback(guard_optimizer(trained))
        return trained

    def accept_unprepared(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Put a model and an optimizer that were never prepared in training, if the backend accepts that."""
        if not self._backend.accepts_unprepared:
            return
        prepared = self._models.find(model)
        bare = prepared is None or (prepared.options.training and prepared.trained is None)
        if not bare or self._models.owner(optimizer) is not None:
            return
        inner = inner_model(model)
        if prepared is None:
            self._models.check_unshared(inner, "backward")
            compile_in_place(model, inner)
        check_belongs(optimizer, inner, "backward")
        self.warn_of_unprepared(inner)
        if prepared is None:
            self._models.add(
                PreparedModel(
                    module=inner, model_class=type(inner), wrapped=inner, options=WrapOptions(training=True),
                    meta_model=meta_copy(inner), memory=ParameterMemory(inner),
                )
            )  # fmt: skip
        self.bind(model, optimizer)

    def warn_of_unprepared(self, model: nn.Module) -> None:
        """Warn once that other backends refuse a model that was not prepared."""
        if not self._warned_of_unprepared:
            self._warned_of_unprepared = True
            logger.warning(
                "%s is used without prepare, which this strategy accepts and the others refuse. Call "
                "prepare((model, optimizer, scheduler)), and use what it returns", type(model).__name__,
            )  # fmt: skip

    def _without_scheduler(self, model: nn.Module, optimizer: Optimizer) -> TrainedModel | None:
        """Return a model in training that was wrapped before its optimizer was created, until it gets its scheduler."""
        prepared = self._models.find(model)
        trained = None if prepared is None else prepared.trained
        return trained if trained is not None and trained.optimizer is optimizer and trained.scheduler is None else None

    def _check_free(self, optimizer: Optimizer, module: nn.Module) -> None:
        for prepared in (self._models.owner(optimizer), self._models.find(module)):
            if prepared is not None and prepared.trained is not None:
                raise StrategyError(
                    f"prepare: expected a model and an optimizer that are not in training, got {prepared.class_name}, which "
                    f"is in training with its {type(prepared.trained.optimizer).__name__}. Prepare a model and its "
                    f"optimizer once, and use what prepare returned"
                )

    def _add(self, prepared: PreparedModel) -> None:
        undo = wrap_forward(
            prepared.wrapped,
            lambda: self._forward(prepared),
            lambda: check_zero_grad(prepared.trained, "zero_grad of the model"),
        )
        prepared.undo.callback(undo)
        prepared.undo.callback(self._sequence_parallel.attach(prepared.module))
        if any(self._is_sharded(parameter) for parameter in prepared.module.parameters()):
            refuse_save_pretrained(prepared.module, prepared.class_name)
        if prepared.options.training:
            prepared.undo.callback(refuse_rank_allocation(prepared.module, prepared.class_name))
        self._models.add(prepared)

    def _is_sharded(self, parameter: nn.Parameter) -> bool:
        return is_dtensor(parameter) or self._backend.full_shape(parameter) != parameter.shape

    @contextmanager
    def _forward(self, prepared: PreparedModel) -> Iterator[None]:
        """Run one forward pass of a prepared model."""
        self._models.require_ready(prepared.module, "forward")
        with (
            self._operations.running("forward"),
            self._backend.forward_context(prepared.module, prepared.options),
            self._sequence_parallel.forward_context(),
        ):
            yield


def _refusal(call: str, argument: object) -> ArgumentError:
    got, remedy = shown(argument), ". Pass the model itself"
    if isinstance(argument, (Optimizer, LRScheduler)):
        got = type(argument).__name__
        remedy = ". Pass the model, its optimizer and its scheduler as one tuple: prepare((model, optimizer, None))"
    return ArgumentError(
        f"{call}: expected a model, (model, optimizer, scheduler), a list of models, or None, got {got}{remedy}"
    )


def _is_training_triple(argument: object) -> bool:
    """Return whether this is (model, optimizer, scheduler), any of which may be None, and not several models."""
    return (
        isinstance(argument, tuple)
        and len(argument) == 3
        and (argument[0] is None or isinstance(argument[0], nn.Module))
        and not isinstance(argument[1], nn.Module)
        and not isinstance(argument[2], nn.Module)
        and (argument[0] is None or argument[1] is not None or argument[2] is None)
    )
