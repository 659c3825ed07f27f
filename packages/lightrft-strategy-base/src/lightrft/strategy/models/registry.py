"""The models that a strategy has prepared, looked up by the model or by its wrapper."""

import itertools
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from weakref import WeakSet

from torch import nn
from torch.optim import Optimizer

from lightrft.config import StrategyError
from lightrft.strategy.backend.types import TrainedModel, WrapOptions
from lightrft.strategy.models.compiled import uncompiled
from lightrft.strategy.models.heads import Head
from lightrft.strategy.models.sharing import ParameterMemory


def is_actor(model: object) -> bool:
    """Return whether ``model`` is an actor, which LightRFT marks with a true attribute ``is_actor``."""
    return bool(getattr(model, "is_actor", False))


def inner_model(model: nn.Module) -> nn.Module:
    """Return the model that an actor wraps as ``.model``, or ``model`` itself if it is not a wrapper.

    A Hugging Face model has a ``.model`` too, its backbone, but is not a wrapper. The wrapper that ``torch.compile``
    returns is one.
    """
    model = uncompiled(model)
    if not is_actor(model) or hasattr(type(model), "from_pretrained"):
        return model
    inner = getattr(model, "model", None)
    return uncompiled(inner) if isinstance(inner, nn.Module) else model


@dataclass(kw_only=True)
class PreparedModel:
    """A prepared model and its state."""

    module: nn.Module
    """The model itself, unwrapped."""
    model_class: type[nn.Module]
    """The class of ``module`` before wrapping, which may replace it."""
    wrapped: nn.Module
    """The module that the caller calls: ``module``, or the backend's wrapper of it."""
    options: WrapOptions
    meta_model: nn.Module | None
    """A copy on the meta device, made before wrapping; None for models that do not train."""
    memory: ParameterMemory
    """Its parameters before wrapping, which may replace them."""
    undo: ExitStack = field(default_factory=ExitStack)
    """Removes what preparing attached to the model, such as the context around its forward pass."""
    trained: TrainedModel | None = None
    """Its optimizer and counters; None if it does not train."""
    offloaded: bool = False
    """Whether it is in host memory, until `reload_model`."""
    head: Head | None = None
    """Its output embedding, once it was found and checked."""
    keeps_packed_apart: bool | None = None
    """Whether no packed sequence depends on those before it, once it was tried."""

    @property
    def names_model(self) -> nn.Module:
        """The model with its names and layers from before wrapping, perhaps on the meta device."""
        return self.module if self.meta_model is None else self.meta_model

    @property
    def class_name(self) -> str:
        """Name of the model's class, for messages."""
        return self.model_class.__name__

    @property
    def exported(self) -> "PreparedModel":
        """The model that is exported and synced, as if it had been prepared alone: the model in a wrapper, or itself.

        LightRFT's scripts prepare averages and reward models with their wrapper, whose ``.model`` is a model of
        transformers, and which has no other weights; or mark it with ``is_actor`` only after it was prepared.
        """
        inner = getattr(self.module, "model", None)
        if not isinstance(inner, nn.Module) or hasattr(type(self.module), "from_pretrained"):
            return self
        if not is_actor(self.module) and (
            not hasattr(type(inner), "from_pretrained") or outside_of_wrapped(self.module)
        ):
            return self
        named: nn.Module = self.names_model.model  # type: ignore[assignment]
        return replace(
            self, module=inner, model_class=type(named), meta_model=None if self.meta_model is None else named
        )


def outside_of_wrapped(wrapper: nn.Module) -> list[str]:
    """Return the names of the weights and persistent buffers of ``wrapper`` that are not in its ``.model``."""
    return [name for name in wrapper.state_dict(keep_vars=True) if not name.startswith("model.")]


_registries: "WeakSet[ModelRegistry]" = WeakSet()
"""Those of all strategies in this process; one is empty once its strategy is closed."""


class ModelRegistry:
    """All prepared models of a strategy."""

    def __init__(self) -> None:
        self._by_id: dict[int, PreparedModel] = {}
        """Each model under the ``id`` of the model itself and of its wrapper."""
        _registries.add(self)

    def __iter__(self) -> Iterator[PreparedModel]:
        return iter({id(prepared): prepared for prepared in self._by_id.values()}.values())

    def add(self, prepared: PreparedModel) -> None:
        """Register a model under itself and its wrapper."""
        self._by_id[id(prepared.module)] = self._by_id[id(prepared.wrapped)] = prepared

    def unwrap(self, model: nn.Module) -> nn.Module:
        """Return the model inside an actor's wrapper and the backend's. Idempotent."""
        prepared = self.find(model)
        return inner_model(model) if prepared is None else prepared.module

    def find(self, model: nn.Module) -> PreparedModel | None:
        """Return the entry of ``model``, or None if it was not prepared."""
        return self._by_id.get(id(model)) or self._by_id.get(id(inner_model(model)))

    def require_known(self, model: nn.Module, call: str) -> PreparedModel:
        """Return the entry of ``model``. Raise `StrategyError` if it was not prepared."""
        prepared = self.find(model)
        if prepared is None:
            raise StrategyError(
                f"{call}: expected a model that this strategy has prepared, got a {type(model).__name__} that is not prepared. "
                f"Pass the model that prepare returned"
            )
        return prepared

    def require_ready(self, model: nn.Module, call: str) -> PreparedModel:
        """Return the entry of ``model``. Raise `StrategyError` if it was not prepared, or was offloaded."""
        prepared = self.require_known(model, call)
        if prepared.offloaded:
            raise StrategyError(
                f"{call}: expected a model on the device, got {prepared.class_name}, which was offloaded. Call "
                f"reload_model first"
            )
        return prepared

    def check_unshared(self, module: nn.Module, call: str) -> None:
        """Raise `StrategyError` if ``module``, which is not prepared, shares parameters with a prepared model.

        Or with a model of another open strategy, which would clip and step them too.
        """
        for prepared in itertools.chain(self, *(registry for registry in _registries if registry is not self)):
            current = {id(parameter) for parameter in prepared.module.parameters()}
            shared = [
                name
                for name, parameter in module.named_parameters()
                if id(parameter) in current or prepared.memory.overlaps(parameter)
            ]
            if shared:
                is_own = any(prepared is own for own in self)
                owner = prepared.class_name if is_own else f"{prepared.class_name} of another open strategy"
                remedy = "train both as one model with one optimizer" if is_own else "close the other strategy first"
                raise StrategyError(
                    f"{call}: expected a model that shares no parameters with a prepared model, got {type(module).__name__}, "
                    f"which shares {len(shared)} with {owner} ({shared[0]} first). A parameter has the gradients, the "
                    f"optimizer and the shards of one model. Give each model its own parameters (copy.deepcopy, before "
                    f"preparing), or {remedy}"
                )

    def is_trained(self, model: object, optimizer: object) -> bool:
        """Return whether ``model`` is in training with ``optimizer``."""
        prepared = self._by_id.get(id(model))
        return prepared is not None and prepared.trained is not None and prepared.trained.optimizer is optimizer

    def require_trained(self, model: nn.Module, optimizer: Optimizer, call: str) -> TrainedModel:
        """Return ``model`` in training with ``optimizer``. Raise `StrategyError` that names the wrong one."""
        prepared = self.find(model)
        if prepared is None or prepared.trained is None:
            raise StrategyError(f"{call}: expected a model in training, {_why_not_trained(model, prepared)}")
        self.require_ready(model, call)
        if prepared.trained.optimizer is not optimizer:
            owner = self.owner(optimizer)
            whose = f"that of another model ({owner.class_name})" if owner else "one it was not prepared with"
            raise StrategyError(
                f"{call}: expected the optimizer of this model ({prepared.class_name}), got {whose} "
                f"({type(optimizer).__name__}). Pass the optimizer that prepare returned with the model"
            )
        return prepared.trained

    def owner(self, optimizer: Optimizer) -> PreparedModel | None:
        """Return the model that ``optimizer`` trains, or None."""
        return next(
            (prepared for prepared in self if prepared.trained is not None and prepared.trained.optimizer is optimizer),
            None,
        )

    @property
    def in_training(self) -> list[TrainedModel]:
        """The models that have an optimizer."""
        return [prepared.trained for prepared in self if prepared.trained is not None]

    @property
    def has_pending_gradient(self) -> bool:
        """Whether some model has accumulated micro-batches that no update has used yet."""
        return any(trained.has_pending_gradient for trained in self.in_training)

    def clear(self) -> None:
        """Remove all models, and what preparing attached to them."""
        for prepared in self:
            prepared.undo.close()
        self._by_id.clear()


def _why_not_trained(model: nn.Module, prepared: PreparedModel | None) -> str:
    name = type(model).__name__
    if prepared is None:
        return f"got {name}, which this strategy has not prepared. Call prepare((model, optimizer, scheduler)), and use what it returns"
    if not prepared.options.training:
        return f"got {name}, which was prepared for inference. Prepare it as (model, optimizer, scheduler) to train it"
    return f"got {name}, which has no optimizer yet. Create one with create_optimizer(model)"
