"""The models that a strategy has prepared, found by the model or by whatever wraps it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from torch import nn
from torch.optim import Optimizer

from lightrft.config import StrategyError
from lightrft.strategy.backend import WrapOptions
from lightrft.strategy.training.modules import inner_model
from lightrft.strategy.training.optimizers import parameters_of
from lightrft.strategy.training.trained_model import TrainedModel


@dataclass(kw_only=True)
class PreparedModel:
    """A model, and what became of it."""

    module: nn.Module
    """The model itself, unwrapped."""
    kind: type[nn.Module]
    """The class of ``module`` before wrapping, which may replace it."""
    wrapped: nn.Module
    """What the caller calls: ``module``, or a wrapper of it."""
    options: WrapOptions
    skeleton: nn.Module | None
    """A copy on the meta device, made before wrapping; None for models that do not train."""
    unguard: Callable[[], None] = lambda: None
    """Takes the guard off ``wrapped`` again."""
    trained: TrainedModel | None = None
    offloaded: bool = False
    names: dict[int, str] = field(default_factory=dict)
    """Names of the parameters by their ``id``, before wrapping and after."""


class PreparedModels:
    """All prepared models of a strategy."""

    def __init__(self) -> None:
        self._models: dict[int, PreparedModel] = {}
        self._inner: dict[int, nn.Module] = {}

    def __iter__(self) -> Iterator[PreparedModel]:
        return iter(self._models.values())

    def add(self, model: PreparedModel) -> None:
        """Remember ``model`` under itself and its wrapper."""
        self._models[id(model.module)] = model
        self._inner[id(model.wrapped)] = model.module

    def unwrap(self, model: nn.Module) -> nn.Module:
        """The model itself, below an actor's wrapper and ours; the same however often it is applied."""
        inner = inner_model(model)
        return self._inner.get(id(inner), inner)

    def find(self, model: nn.Module) -> PreparedModel | None:
        """What became of ``model``, or None where it was not prepared."""
        return self._models.get(id(self.unwrap(model)))

    def at_hand(self, model: nn.Module, call: str) -> PreparedModel:
        """What became of ``model``. Raises `StrategyError` where it was not prepared, or was offloaded."""
        found = self.find(model)
        if found is None:
            raise StrategyError(f"{call}: this strategy has not prepared the model ({type(model).__name__})")
        if found.offloaded:
            raise StrategyError(f"{call}: {found.kind.__name__} was offloaded; call reload_model before")
        return found

    def trained(self, model: nn.Module, optimizer: Optimizer, call: str) -> TrainedModel:
        """``model`` in training with ``optimizer``. Raises `StrategyError` that says which of the two is wrong."""
        prepared = self.find(model)
        if prepared is None or prepared.trained is None:
            raise StrategyError(f"{call}: {_why_not_trained(model, prepared)}")
        self.at_hand(model, call)
        if prepared.trained.optimizer is not optimizer:
            other = self.owner(optimizer)
            whose = (
                f"belongs to another model ({other.kind.__name__})" if other else "is not the one it was prepared with"
            )
            raise StrategyError(
                f"{call}: the optimizer ({type(optimizer).__name__}) {whose}; this model is "
                f"{prepared.kind.__name__}. Pass the optimizer that prepare returned with the model"
            )
        return prepared.trained

    def owner(self, optimizer: Optimizer) -> PreparedModel | None:
        """The model that ``optimizer`` trains."""
        return next((it for it in self if it.trained is not None and it.trained.optimizer is optimizer), None)

    def clear(self) -> None:
        """Forget all models, and take their guards off."""
        for model in self:
            model.unguard()
        self._models.clear()
        self._inner.clear()


def _why_not_trained(model: nn.Module, prepared: PreparedModel | None) -> str:
    kind = type(model).__name__
    if prepared is None:
        return f"this strategy has not prepared the model ({kind}); call prepare((model, optimizer, scheduler)), and use what it returns"
    if not prepared.options.training:
        return f"the model ({kind}) was prepared for inference; prepare it as (model, optimizer, scheduler) to train it"
    return (
        f"the model ({kind}) was prepared for training and has no optimizer yet; make one with create_optimizer(model)"
    )


def holds_parameters_of(optimizer: Optimizer, module: nn.Module) -> bool:
    """Whether all parameters of ``optimizer`` are in ``module``."""
    known = {id(parameter) for parameter in module.parameters()}
    return all(id(parameter) in known for parameter in parameters_of(optimizer))
