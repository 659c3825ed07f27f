"""Operations that train: micro-batches, updates, averages, offloading, and looking at what they did."""

from typing import Any

import torch

from lightrft.conformance import models
from lightrft.conformance.interpreter.session import Entry, Session, operation
from lightrft.conformance.values import digest

POISONS = {"nan": float("nan"), "inf": float("inf"), "-inf": float("-inf"), "huge": 1e30}


@operation
def backward(
    session: Session, model: str, batch: int, rows: int = 2, weight: float = 1.0, poison: str | None = None,
    poisoned_rank: int = 0, optimizer_of: str | None = None, loss_of: str | None = None,
) -> float:  # fmt: skip
    """Forward and backward of one batch; ``poison`` spoils the gradient on one rank. Returns the loss."""
    entry, source = session.models[model], session.models[loss_of or model]
    inputs, targets = models.batch(batch, session.rank, rows, models.is_language(source.module))
    device = session.strategy.device
    loss = weight * models.loss_of(source.model, inputs.to(device), targets.to(device))
    if poison is not None and session.rank == poisoned_rank:
        loss = loss * POISONS[poison]
    owner = session.models[optimizer_of or model].optimizer
    assert owner is not None
    session.strategy.backward(loss, entry.model, owner)
    return float(loss)


@operation
def backward_twice(session: Session, model: str, batch: int) -> None:
    """One forward, and two backwards through the same graph."""
    entry = session.models[model]
    inputs, targets = models.batch(batch, session.rank, 2, models.is_language(entry.module))
    device = session.strategy.device
    loss = models.loss_of(entry.model, inputs.to(device), targets.to(device))
    assert entry.optimizer is not None
    session.strategy.backward(loss, entry.model, entry.optimizer, retain_graph=True)
    session.strategy.backward(0.5 * loss, entry.model, entry.optimizer)


@operation
def bad_backward(session: Session, model: str, what: str, batch: int = 0) -> None:
    """A loss that cannot be: "vector", "detached", "number"."""
    entry = session.models[model]
    inputs, targets = models.batch(batch, session.rank, 2, models.is_language(entry.module))
    device = session.strategy.device
    outputs = models.logits_of(entry.model, inputs.to(device))
    losses: dict[str, Any] = {
        "vector": (outputs - targets.to(device)).pow(2).mean(dim=1),
        "detached": outputs.detach().mean(),
        "number": 0.5,
    }
    loss = losses[what]
    session.strategy.backward(loss, entry.model, entry.optimizer)  # type: ignore[arg-type]


@operation
def step(
    session: Session, model: str, boundary: bool | None = None, scheduled: bool = False, optimizer_of: str | None = None
) -> dict[str, Any]:
    """optimizer_step; what it says that it did."""
    entry = session.models[model]
    owner = session.models[optimizer_of or model].optimizer
    assert owner is not None
    arguments: dict[str, Any] = {} if boundary is None else {"boundary": boundary}
    if scheduled:
        result = session.strategy.optimizer_step(owner, entry.model, entry.scheduler, **arguments)
    else:
        result = session.strategy.optimizer_step(owner, entry.model, **arguments)
    return {"applied": result.applied, "skipped": result.skipped, "grad_norm": result.grad_norm}


@operation
def weights(session: Session, model: str) -> dict[str, torch.Tensor]:
    """All parameters, whole, in fp32."""
    stream = session.strategy.full_parameters(session.models[model].model, dtype=torch.float32)
    trained = {name for name, _ in session.models[model].module.named_parameters(remove_duplicate=False)}
    return {name: tensor.clone() for bucket in stream for name, tensor in bucket if name in trained}


@operation
def stream(session: Session, model: str, bucket_bytes: int) -> dict[str, Any]:
    """full_parameters in small buckets: names in order, bytes of each bucket, and the values."""
    names: list[str] = []
    sizes: list[list[int]] = []
    values: dict[str, torch.Tensor] = {}
    for bucket in session.strategy.full_parameters(session.models[model].model, bucket_bytes):
        sizes.append([tensor.nbytes for _, tensor in bucket])
        for name, tensor in bucket:
            names.append(name)
            values[name] = tensor.float().clone()
    return {"names": names, "sizes": sizes, "values": values}


@operation
def state(session: Session, model: str) -> dict[str, Any]:
    """Fingerprints of this rank's parameters and optimizer state, the rates, and the schedule's step."""
    entry = session.models[model]
    session.strategy.unwrap_model(entry.model)
    return {
        "parameters": digest([parameter.detach() for parameter in _settled(session, entry)]),
        "optimizer": digest(_optimizer_state(entry)),
        "rates": [group["lr"] for group in entry.optimizer.param_groups] if entry.optimizer else [],
        "schedule": entry.scheduler.last_epoch if entry.scheduler is not None else None,
    }


def _settled(session: Session, entry: Entry) -> list[torch.Tensor]:
    """The whole parameters, on every rank."""
    stream = session.strategy.full_parameters(entry.model, dtype=torch.float32)
    return [tensor.clone() for bucket in stream for _, tensor in bucket]


def _optimizer_state(entry: Entry) -> list[Any]:
    if entry.optimizer is None:
        return []
    return [dict(sorted(state.items())) for state in entry.optimizer.state.values() if state]


@operation
def state_sizes(session: Session, model: str) -> int:
    """Number of elements of optimizer state on this rank."""
    entry = session.models[model]
    states = [] if entry.optimizer is None else entry.optimizer.state.values()
    return sum(value.numel() for it in states for value in it.values() if isinstance(value, torch.Tensor))


@operation
def forward(session: Session, model: str, batch: int, rows: int = 2, **more: Any) -> torch.Tensor:
    """The outputs for one batch, without a graph; ``more`` are keywords of the model's."""
    entry = session.models[model]
    inputs, _ = models.batch(batch, session.rank, rows, models.is_language(entry.module))
    with torch.no_grad():
        outputs = models.logits_of(entry.model, inputs.to(session.strategy.device), **more)
    return outputs.float()


@operation
def set_rate(session: Session, model: str, lr: float) -> None:
    """Change the learning rate in param_groups."""
    optimizer = session.models[model].optimizer
    assert optimizer is not None
    for group in optimizer.param_groups:
        group["lr"] = lr


@operation
def set_decay(session: Session, model: str, weight_decay: float) -> None:
    """Change the weight decay in those param_groups that have any."""
    optimizer = session.models[model].optimizer
    assert optimizer is not None
    for group in optimizer.param_groups:
        group["weight_decay"] = weight_decay if group["weight_decay"] else 0.0


@operation
def set_betas(session: Session, model: str, betas: list[float]) -> None:
    """Change Adam's betas in param_groups."""
    optimizer = session.models[model].optimizer
    assert optimizer is not None
    for group in optimizer.param_groups:
        group["betas"] = tuple(betas)


@operation
def average(session: Session, model: str, into: str, beta: float) -> None:
    """moving_average."""
    session.strategy.moving_average(session.models[model].model, session.models[into].model, beta)


@operation
def offload_optimizer(session: Session, model: str) -> None:
    """maybe_offload_optimizer."""
    optimizer = session.models[model].optimizer
    assert optimizer is not None
    session.strategy.maybe_offload_optimizer(optimizer)


@operation
def load_optimizer(session: Session, model: str) -> None:
    """maybe_load_optimizer."""
    optimizer = session.models[model].optimizer
    assert optimizer is not None
    session.strategy.maybe_load_optimizer(optimizer)


@operation
def offload_model(session: Session, model: str) -> None:
    """offload_model."""
    session.strategy.offload_model(session.models[model].model)


@operation
def reload_model(session: Session, model: str) -> None:
    """reload_model."""
    session.strategy.reload_model(session.models[model].model)


@operation
def device_bytes(session: Session) -> int:
    """Memory allocated on the device."""
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()
