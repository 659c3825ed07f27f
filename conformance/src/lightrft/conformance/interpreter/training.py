"""Operations that train, average and offload, and that read their results."""

from typing import Any

import torch

from lightrft.conformance import models
from lightrft.conformance.interpreter.session import Entry, Session, operation
from lightrft.conformance.values import Record, plain


@operation
def backward(
    session: Session, model: str, batch: int, rows: int = 2, weight: float = 1.0, poison: str | None = None,
    poisoned_rank: int = 0, optimizer_of: str | None = None, loss_of: str | None = None, data_of: int | None = None,
) -> float:  # fmt: skip
    """Forward and backward of one batch; ``poison`` multiplies the loss on one rank. Returns the loss.

    ``data_of``: the rank whose batch to use, by default this one.
    """
    entry, source = session.models[model], session.models[loss_of or model]
    rank = session.rank if data_of is None else data_of
    inputs, targets = models.batch(batch, rank, rows, models.is_language(source.module))
    device = session.strategy.device
    loss = weight * models.loss_of(source.model, inputs.to(device), targets.to(device))
    if poison is not None and session.rank == poisoned_rank:
        loss = loss * models.POISONS[poison]
    session.strategy.backward(loss, entry.model, session.optimizer(optimizer_of or model))
    return float(loss)


@operation
def backward_twice(session: Session, model: str, batch: int) -> None:
    """One forward, and two backwards through the same graph."""
    entry = session.models[model]
    inputs, targets = models.batch(batch, session.rank, 2, models.is_language(entry.module))
    device = session.strategy.device
    loss = models.loss_of(entry.model, inputs.to(device), targets.to(device))
    session.strategy.backward(loss, entry.model, session.optimizer(model), retain_graph=True)
    session.strategy.backward(0.5 * loss, entry.model, session.optimizer(model))


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
    session.strategy.backward(losses[what], entry.model, entry.optimizer)  # type: ignore[arg-type]


@operation
def train_on(
    session: Session, model: str, loader: str, epoch: int, consumed: int = 0, update_batches: int | None = None
) -> list[Record]:
    """Train on the batches of an epoch; for each update, this rank's samples since the last update, and the loss.

    ``update_batches``: end an update after so many batches with ``boundary``, instead of counting micro-batches.
    """
    entry, optimizer, data = session.models[model], session.optimizer(model), session.memory[loader]
    pending: list[int] = session.memory.setdefault(f"samples of {model}", [])
    updates = []
    data.set_epoch(epoch, consumed)
    for number, batch in enumerate(data, 1):
        pending += batch.tolist()
        boundary = None if update_batches is None else number % update_batches == 0
        session.strategy.backward(
            models.loss_over_samples(entry.model, batch.tolist(), session.strategy.device), entry.model, optimizer
        )
        result = session.strategy.optimizer_step(optimizer, entry.model, boundary=boundary)
        if result.applied:
            updates.append({"samples": list(pending), "loss": result.loss})
            pending.clear()
    return updates


@operation
def policy_backward(
    session: Session, model: str, batch: int, rows: int = 2, temperature: float = 1.0, packed: bool = False
) -> dict[str, torch.Tensor]:
    """token_log_probs of one padded or packed batch, and the backward of a loss from it; what it returned."""
    entry, device = session.models[model], session.strategy.device
    make, name = (models.packed_batch, "position_ids") if packed else (models.padded_batch, "attention_mask")
    tokens, second = (part.to(device) for part in make(batch, session.rank, rows))
    result = session.strategy.token_log_probs(
        entry.model, tokens, **{name: second}, temperature=temperature, entropy=True
    )
    assert result.entropy is not None
    session.strategy.backward(
        models.policy_loss(result.log_probs, result.entropy), entry.model, session.optimizer(model)
    )
    return {"log_probs": result.log_probs.detach(), "entropy": result.entropy.detach()}


@operation
def step(
    session: Session, model: str, boundary: bool | None = None, scheduled: bool = False,
    optimizer_of: str | None = None, wrong: str | None = None, wrong_rank: int = 0, wrong_of: str = "b",
) -> dict[str, object]:  # fmt: skip
    """optimizer_step; its result.

    ``wrong``: the argument, "optimizer", "model" or "scheduler", that ``wrong_rank`` takes from the model ``wrong_of``.
    """
    entry = session.models[model]
    arguments: dict[str, Any] = {"optimizer": session.optimizer(optimizer_of or model), "model": entry.model}
    if boundary is not None:
        arguments["boundary"] = boundary
    if scheduled:
        arguments["scheduler"] = entry.scheduler
    if wrong is not None and session.rank == wrong_rank:
        arguments[wrong] = getattr(session.models[wrong_of], wrong)
    result = session.strategy.optimizer_step(**arguments)
    return {
        "applied": result.applied,
        "skipped": result.skipped,
        "grad_norm": result.grad_norm,
        "denominator": result.denominator,
        "loss": result.loss,
    }


@operation
def weights(session: Session, model: str) -> dict[str, torch.Tensor]:
    """All parameters, unsharded, in fp32."""
    trained = {name for name, _ in session.models[model].module.named_parameters(remove_duplicate=False)}
    streamed = session.weights(session.models[model].model)
    named = [
        (name if name in trained else name.removeprefix("model."), tensor) for name, tensor in streamed
    ]  # of a wrapper
    return {name: tensor for name, tensor in named if name in trained}


@operation
def stream(session: Session, model: str, bucket_bytes: int, dtype: str | None = None) -> dict[str, object]:
    """full_parameters in small buckets: the names in order, the tensor sizes of each bucket in bytes, and the values."""
    more = {} if dtype is None else {"dtype": getattr(torch, dtype)}
    names: list[str] = []
    sizes: list[list[int]] = []
    values: dict[str, torch.Tensor] = {}
    for bucket in session.strategy.full_parameters(session.models[model].model, bucket_bytes, **more):
        sizes.append([tensor.nbytes for _, tensor in bucket])
        for name, tensor in bucket:
            names.append(name)
            values[name] = tensor.float().clone()
    return {"names": names, "sizes": sizes, "values": values}


@operation
def state(session: Session, model: str) -> dict[str, object]:
    """Parameters, buffers and this rank's optimizer state by name, the learning rates, and the scheduler's step."""
    entry = session.models[model]
    return {
        "parameters": {name: plain(tensor) for name, tensor in session.weights(entry.model)},
        "buffers": {name: plain(tensor) for name, tensor in session.strategy.unwrap_model(entry.model).named_buffers()},
        "optimizer": optimizer_state(session, entry),
        "rates": [group["lr"] for group in entry.optimizer.param_groups] if entry.optimizer else [],
        "schedule": entry.scheduler.last_epoch if entry.scheduler is not None else None,
    }


def optimizer_state(session: Session, entry: Entry) -> dict[str, object]:
    """This rank's optimizer state, by the name of the parameter, or its number if the optimizer holds another tensor."""
    if entry.optimizer is None:
        return {}
    module = session.strategy.unwrap_model(entry.model)
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return {
        f"{names.get(id(key), f'tensor {number}')} {name}": plain(value)
        for number, (key, state) in enumerate(entry.optimizer.state.items())
        for name, value in sorted(state.items())
    }


@operation
def state_sizes(session: Session, model: str) -> int:
    """The number of elements of optimizer state on this rank."""
    entry = session.models[model]
    states = [] if entry.optimizer is None else entry.optimizer.state.values()
    return sum(value.numel() for state in states for value in state.values() if isinstance(value, torch.Tensor))


@operation
def forward(session: Session, model: str, batch: int, rows: int = 2, **more: object) -> torch.Tensor:
    """The outputs for one batch under no_grad; ``more`` are keyword arguments of the model."""
    entry = session.models[model]
    inputs, _ = models.batch(batch, session.rank, rows, models.is_language(entry.module))
    with torch.no_grad():
        outputs = models.logits_of(entry.model, inputs.to(session.strategy.device), **more)
    return outputs.float()


@operation
def evaluate(session: Session, model: str, batch: int, inference_mode: bool = False) -> None:
    """A forward pass under no_grad, or under inference_mode, whose outputs are dropped."""
    entry = session.models[model]
    inputs, _ = models.batch(batch, session.rank, 2, models.is_language(entry.module))
    with torch.inference_mode() if inference_mode else torch.no_grad():
        models.logits_of(entry.model, inputs.to(session.strategy.device))


@operation
def set_rate(session: Session, model: str, lr: float, decayed: bool = False) -> None:
    """Change the learning rate in all param_groups, or with ``decayed`` in those with weight decay."""
    for group in session.optimizer(model).param_groups:
        group["lr"] = lr if group["weight_decay"] or not decayed else group["lr"]


@operation
def set_group(session: Session, model: str, group: int, values: dict[str, Any]) -> None:
    """Change hyperparameters of one of the param_groups: the first has a weight decay, the second has none."""
    groups = sorted(session.optimizer(model).param_groups, key=lambda each: not each["weight_decay"])
    groups[group].update({name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


@operation
def set_eps(session: Session, model: str, eps: float) -> None:
    """Change Adam's eps in param_groups."""
    for group in session.optimizer(model).param_groups:
        group["eps"] = eps


@operation
def set_decay(session: Session, model: str, weight_decay: float) -> None:
    """Change the weight decay in the param_groups that have one."""
    for group in session.optimizer(model).param_groups:
        group["weight_decay"] = weight_decay if group["weight_decay"] else 0.0


@operation
def set_betas(session: Session, model: str, betas: list[float]) -> None:
    """Change Adam's betas in param_groups."""
    for group in session.optimizer(model).param_groups:
        group["betas"] = tuple(betas)


@operation
def average(session: Session, model: str, into: str, beta: float) -> None:
    """moving_average."""
    session.strategy.moving_average(session.models[model].model, session.models[into].model, beta)


@operation
def offload_optimizer(session: Session, model: str) -> None:
    """maybe_offload_optimizer."""
    session.strategy.maybe_offload_optimizer(session.optimizer(model))


@operation
def load_optimizer(session: Session, model: str) -> None:
    """maybe_load_optimizer."""
    session.strategy.maybe_load_optimizer(session.optimizer(model))


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
