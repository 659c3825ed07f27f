"""Operations that train, average and offload, and that read their results."""

from typing import Any

import torch

from lightrft.conformance import models
from lightrft.conformance.interpreter.session import Entry, Session, operation
from lightrft.conformance.values import digest


@operation
def backward(
    session: Session, model: str, batch: int, rows: int = 2, weight: float = 1.0, poison: str | None = None,
    poisoned_rank: int = 0, optimizer_of: str | None = None, loss_of: str | None = None,
) -> float:  # fmt: skip
    """Forward and backward of one batch; ``poison`` multiplies the loss on one rank. Returns the loss."""
    entry, source = session.models[model], session.models[loss_of or model]
    inputs, targets = models.batch(batch, session.rank, rows, models.is_language(source.module))
    device = session.strategy.device
    loss = weight * models.loss_of(source.model, inputs.to(device), targets.to(device))
    if poison is not None and session.rank == poisoned_rank:
        loss = loss * models.POISONS[poison]
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
    """Backward with an invalid loss: "vector", "detached" or "number"."""
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
    """optimizer_step; its result."""
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
    """All parameters, unsharded, in fp32."""
    stream = session.strategy.full_parameters(session.models[model].model, dtype=torch.float32)
    trained = {name for name, _ in session.models[model].module.named_parameters(remove_duplicate=False)}
    return {name: tensor.clone() for bucket in stream for name, tensor in bucket if name in trained}


@operation
def stream(session: Session, model: str, bucket_bytes: int) -> dict[str, Any]:
    """full_parameters in small buckets: the names in order, the tensor sizes of each bucket in bytes, and the values."""
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
    """Digests of the parameters and of this rank's optimizer state, the learning rates, and the scheduler's step."""
    entry = session.models[model]
    session.strategy.unwrap_model(entry.model)
    return {
        "parameters": digest([parameter.detach() for parameter in _full_parameters(session, entry)]),
        "optimizer": digest(_optimizer_state(entry)),
        "rates": [group["lr"] for group in entry.optimizer.param_groups] if entry.optimizer else [],
        "schedule": entry.scheduler.last_epoch if entry.scheduler is not None else None,
    }


def _full_parameters(session: Session, entry: Entry) -> list[torch.Tensor]:
    """The unsharded parameters, in fp32."""
    stream = session.strategy.full_parameters(entry.model, dtype=torch.float32)
    return [tensor.clone() for bucket in stream for _, tensor in bucket]


def _optimizer_state(entry: Entry) -> list[Any]:
    if entry.optimizer is None:
        return []
    return [dict(sorted(state.items())) for state in entry.optimizer.state.values() if state]


@operation
def state_sizes(session: Session, model: str) -> int:
    """The number of elements of optimizer state on this rank."""
    entry = session.models[model]
    states = [] if entry.optimizer is None else entry.optimizer.state.values()
    return sum(value.numel() for state in states for value in state.values() if isinstance(value, torch.Tensor))


@operation
def forward(session: Session, model: str, batch: int, rows: int = 2, **more: Any) -> torch.Tensor:
    """The outputs for one batch under no_grad; ``more`` are keyword arguments of the model."""
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
    """Change the weight decay in the param_groups that have one."""
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
