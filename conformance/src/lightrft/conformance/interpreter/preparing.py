"""Operations that build models, optimizers, schedules and loaders, and prepare them."""

from typing import Any

import torch
from torch import nn

from lightrft.conformance import models
from lightrft.conformance.interpreter.session import Entry, Session, operation


@operation
def build(
    session: Session, model: str, kind: str = "regressor", seed: int = 0, differ: bool = False, dtype: str = "float32",
    meta: bool = False, actor: bool = False,
) -> None:  # fmt: skip
    """Build a model; ``differ``: another one on each rank; ``meta``: inside init_model_context(meta_init=True)."""
    own_seed = seed + (session.rank if differ else 0)
    if meta:
        with session.strategy.init_model_context(meta_init=True):
            module = models.KINDS[kind]()
        if not any(tensor.is_meta for tensor in [*module.parameters(), *module.buffers()]):
            module.load_state_dict(models.build(kind, seed).state_dict())
    else:
        module = models.build(kind, own_seed)
    module = module.to(getattr(torch, dtype))
    whole = models.Actor(module) if actor else module
    session.models[model] = Entry(module=module, model=whole)


@operation
def optimizer(
    session: Session, model: str, lr: float = 1e-3, weight_decay: float = 0.0, by_hand: bool = False, **more: Any
) -> None:
    """create_optimizer, or, ``by_hand``, torch's own AdamW over all parameters."""
    entry = session.models[model]
    if "betas" in more:
        more["betas"] = tuple(more["betas"])
    if by_hand:
        entry.optimizer = torch.optim.AdamW(entry.model.parameters(), lr=lr, weight_decay=weight_decay, **more)
    else:
        entry.optimizer = session.strategy.create_optimizer(entry.model, lr=lr, weight_decay=weight_decay, **more)


@operation
def schedule(session: Session, model: str, decay: float = 0.5) -> None:
    """A schedule on the optimizer: the rate is divided by 1 + decay x updates."""
    entry = session.models[model]
    assert entry.optimizer is not None
    entry.scheduler = torch.optim.lr_scheduler.LambdaLR(entry.optimizer, lambda step: 1 / (1 + decay * step))


@operation
def prepare(session: Session, model: str) -> dict[str, bool]:
    """prepare((model, optimizer, scheduler)); whether the objects that come back are the caller's own."""
    entry = session.models[model]
    given = (entry.model, entry.optimizer, entry.scheduler)
    back = session.strategy.prepare(given)
    structure = isinstance(back, tuple) and len(back) == 3
    entry.model = back[0]
    return {"structure": structure, "optimizer": back[1] is given[1], "scheduler": back[2] is given[2]}


@operation
def prepare_inference(session: Session, model: str, listed: bool = False) -> bool:
    """prepare(model), or prepare([model])."""
    entry = session.models[model]
    entry.model = session.strategy.prepare([entry.model])[0] if listed else session.strategy.prepare(entry.model)
    return isinstance(entry.model, nn.Module)


@operation
def prepare_model(session: Session, model: str, training: bool = True, **more: Any) -> None:
    """prepare_model(model, is_training=...)."""
    entry = session.models[model]
    entry.model = session.strategy.prepare_model(entry.model, is_training=training, **more)


@operation
def prepare_shapes(session: Session, arguments: list[Any]) -> Any:
    """prepare with several arguments at once; the structure of what comes back.

    An argument is "model", "triple", "none", "empty triple", or a list of these.
    """
    back = session.strategy.prepare(*[_argument(session, item) for item in arguments])
    return _structure(back)


def _argument(session: Session, item: Any) -> Any:
    if isinstance(item, list):
        return [_argument(session, part) for part in item]
    if item == "model":
        return models.build("regressor", 1)
    if item == "triple":
        model = models.build("regressor", 2)
        made = session.strategy.create_optimizer(model, lr=1e-3)
        return (model, made, torch.optim.lr_scheduler.LambdaLR(made, lambda step: 1.0))
    return (None, None, None) if item == "empty triple" else None


def _structure(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [type(value).__name__, *(_structure(item) for item in value)]
    kinds = [
        (nn.Module, "model"),
        (torch.optim.Optimizer, "optimizer"),
        (torch.optim.lr_scheduler.LRScheduler, "scheduler"),
    ]
    return next((name for kind, name in kinds if isinstance(value, kind)), type(value).__name__)


@operation
def prepare_set(session: Session, critic: bool, rewards: int, steps: int = 10) -> Any:
    """prepare_models_and_optimizers; the structure of what comes back, the rate that the actor begins with, and what
    actor and critic rise to."""
    reward_models = [models.build("regressor", 10 + index) for index in range(rewards)] if rewards else None
    back = session.strategy.prepare_models_and_optimizers(
        models.Actor(models.build("language", 1)),
        models.build("regressor", 2) if critic else None,
        reward_models,
        models.build("language", 3),
        None,
        steps,
    )
    peaks = [scheduler.base_lrs[0] for _, _, scheduler in back[:2] if scheduler is not None]
    return {"structure": _structure(back), "rate": back[0][1].param_groups[0]["lr"], "peaks": peaks}


@operation
def unwrapped(session: Session, model: str, times: int = 1) -> dict[str, Any]:
    """unwrap_model: the classes of what comes back, and the names of its parameters."""
    entry = session.models[model]
    inner = entry.model
    for _ in range(times):
        inner = session.strategy.unwrap_model(inner)
    names = [name for name, _ in inner.named_parameters()]
    alive = {id(parameter) for parameter in entry.model.parameters()}
    return {
        "is_own": isinstance(inner, type(entry.module)),
        "names": names,
        "is_it": inner is session.strategy.unwrap_model(entry.model),
        "shares": alive == {id(parameter) for parameter in inner.parameters()},
    }


@operation
def modes(session: Session, model: str) -> list[bool]:
    """Whether the model and its parts are in training mode: all that is found."""
    inner = session.strategy.unwrap_model(session.models[model].model)
    return sorted({part.training for part in inner.modules()})


@operation
def buffers(session: Session, model: str) -> dict[str, torch.Tensor]:
    """The buffers of a model, before preparing or after."""
    inner = session.strategy.unwrap_model(session.models[model].model)
    return {name: buffer.detach().cpu().clone() for name, buffer in inner.named_buffers()}


@operation
def freeze(session: Session, model: str, part: str) -> None:
    """From now on a part of the model does not train."""
    inner = session.strategy.unwrap_model(session.models[model].model)
    inner.get_submodule(part).requires_grad_(False)


@operation
def uninitialised(session: Session, model: str) -> list[str]:
    """Parameters and buffers of the model, as it is called, that have no memory, or no finite values."""
    module = session.strategy.unwrap_model(session.models[model].model)
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return [name for name, tensor in tensors if tensor.is_meta or not torch.isfinite(_local(tensor)).all()]


def _local(tensor: torch.Tensor) -> torch.Tensor:
    local = getattr(tensor, "_local_tensor", tensor).detach()
    return local if local.numel() else torch.zeros(1)


@operation
def loader(
    session: Session,
    name: str,
    samples: int,
    batch_size: int,
    shuffle: bool = True,
    drop_last: bool = True,
    consumed: int = 0,
) -> None:
    """setup_dataloader over the numbers 0 to ``samples`` - 1."""
    data = list(range(samples))
    session.memory[name] = session.strategy.setup_dataloader(
        data, batch_size, shuffle=shuffle, drop_last=drop_last, consumed_samples=consumed
    )


@operation
def batches(session: Session, name: str, epoch: int | None = None, first: int | None = None) -> dict[str, Any]:
    """The samples of each batch on this rank, of the whole iteration or of its ``first``; and the position after it."""
    found = session.memory[name]
    if epoch is not None:
        found.set_epoch(epoch)
    seen = []
    for index, batch in enumerate(found):
        if first is not None and index == first:
            break
        seen.append(batch.tolist())
        if first is not None and index == first - 1:
            break
    return {"batches": seen, "consumed": found.consumed_samples}


@operation
def resume(session: Session, name: str, epoch: int, consumed: int) -> dict[str, Any]:
    """The samples of a loader that goes on at ``consumed`` of ``epoch``."""
    found = session.memory[name]
    found.set_epoch(epoch, consumed)
    return {"batches": [batch.tolist() for batch in found]}
