"""Operations that train with denominators."""

from collections.abc import Callable, Sequence

import torch

from lightrft.conformance import models
from lightrft.conformance.interpreter.session import Session, operation

FORMS: dict[str, Callable[[float, torch.device], float | torch.Tensor]] = {
    "number": lambda value, device: value,
    "float": lambda value, device: float(value),
    "tensor": lambda value, device: torch.tensor(value, device=device),
    "vector on the host": lambda value, device: torch.tensor([value]),
    "fp32": lambda value, device: torch.tensor(value, device=device, dtype=torch.float32),
}
"""What a script may pass as a denominator."""


@operation
def backward_over(
    session: Session, model: str, sequences: Sequence[Sequence[int]],
    denominators: Sequence[float | None] | None = None, form: str = "number", weight: float = 1.0,
) -> float:  # fmt: skip
    """Forward and backward of the sum of the losses of this rank's ``sequences``. Returns the loss.

    ``denominators``: by rank, in place of the number of items. ``form``: see `FORMS`.
    """
    entry, rank_sequences = session.models[model], sequences[session.rank]
    loss = weight * models.loss_over(entry.model, rank_sequences)
    given = sum(map(models.items_in, rank_sequences)) if denominators is None else denominators[session.rank]
    arguments = {} if given is None else {"denominator": FORMS[form](given, session.strategy.device)}
    session.strategy.backward(loss, entry.model, session.optimizer(model), **arguments)  # type: ignore[arg-type]
    return float(loss)
