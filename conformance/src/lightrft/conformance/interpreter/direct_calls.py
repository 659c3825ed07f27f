"""Operations on a prepared model and its optimizer that bypass the strategy."""

import torch

from lightrft.conformance import models
from lightrft.conformance.interpreter.session import Session, operation


@operation
def zero_grad(session: Session, model: str, of: str = "optimizer") -> None:
    """zero_grad of the optimizer, or of the model."""
    owner = session.optimizer(model) if of == "optimizer" else session.models[model].model
    owner.zero_grad()


@operation
def direct_step(session: Session, model: str) -> None:
    """Call the optimizer's step, not optimizer_step."""
    session.optimizer(model).step()


@operation
def add_group(session: Session, model: str, part: str, lr: float) -> None:
    """Add a frozen part of the model to the optimizer, and let it train."""
    module = session.strategy.unwrap_model(session.models[model].model).get_submodule(part)
    session.optimizer(model).add_param_group({"params": list(module.parameters()), "lr": lr})
    module.requires_grad_(True)


@operation
def own_optimizer(session: Session, model: str, algorithm: str, lr: float) -> None:
    """The script's own optimizer of all parameters."""
    entry = session.models[model]
    entry.optimizer = models.OPTIMIZERS[algorithm](entry.model.parameters(), lr=lr)


@operation
def write_weights(session: Session, model: str, part: str, factor: float) -> None:
    """Multiply the weights of a part of the model, in place."""
    module = session.strategy.unwrap_model(session.models[model].model).get_submodule(part)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(factor)
