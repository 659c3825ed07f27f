"""Operations that build and prepare models, optimizers, schedulers and data loaders."""

from typing import Any

import torch
from torch import nn

from lightrft.conformance import models
from lightrft.conformance.interpreter.session import Entry, Session, operation


@operation
def build(
    session: Session, model: str, kind: str = "regressor", seed: int = 0, differ: bool = False, dtype: str = "float32",
    meta: bool = False, actor: bool = False, wrapped: bool = False, compiled: bool = False, of: str | None = None,
    shares: str = "",
) -> None:  # fmt: skip
    """Build a model.

    ``differ``: each rank builds different weights; ``meta``: build inside init_model_context(meta_init=True), within another
    and after an all_reduce;
    ``actor``, ``wrapped``: in a wrapper that is marked as an actor, or not;
    ``compiled``: torch.compile, with its eager backend; ``of``, ``shares``: what it shares with another model of its
    kind: a "module", a "parameter" or the "memory" of one.
    """
    if meta:
        strategy = session.strategy
        with strategy.init_model_context(meta_init=True):
            ranks = strategy.all_reduce(1, "sum")
            with strategy.init_model_context(meta_init=True):
                module = models.KINDS[kind]()
        assert ranks == strategy.world_size, (
            f"all_reduce in init_model_context gave {ranks} for {strategy.world_size} ranks"
        )
        if not any(tensor.is_meta for tensor in [*module.parameters(), *module.buffers()]):
            module.load_state_dict(models.build(kind, seed).state_dict())
    else:
        module = models.build(kind, seed + (session.rank if differ else 0))
    module = module.to(getattr(torch, dtype))
    if of is not None:
        _share(module, session.models[of].module, shares)
    wrapper: Any = models.Actor(module) if actor else models.Wrapper(module) if wrapped else module
    if compiled:
        wrapper = torch.compile(wrapper, backend="eager")
    session.models[model] = Entry(module=module, model=wrapper)


def _share(module: Any, other: Any, what: str) -> None:
    """Give the head of ``module``, or what it has inside, to that of ``other``."""
    if what == "module":
        module.head = other.head
    elif what == "parameter":
        module.head.weight = other.head.weight
    else:
        module.head.weight = nn.Parameter(other.head.weight.detach())


@operation
def optimizer(
    session: Session, model: str, lr: float = 1e-3, weight_decay: float = 0.0, plain_adamw: bool = False, **more: Any
) -> None:
    """create_optimizer; with ``plain_adamw``, torch's AdamW over all parameters."""
    entry = session.models[model]
    if "betas" in more:
        more["betas"] = tuple(more["betas"])
    if plain_adamw:
        entry.optimizer = torch.optim.AdamW(entry.model.parameters(), lr=lr, weight_decay=weight_decay, **more)
    else:
        entry.optimizer = session.strategy.create_optimizer(entry.model, lr=lr, weight_decay=weight_decay, **more)


@operation
def schedule(session: Session, model: str, decay: float = 0.5) -> None:
    """A scheduler that divides the learning rate by 1 + decay x updates."""
    divided = torch.optim.lr_scheduler.LambdaLR(session.optimizer(model), lambda step: 1 / (1 + decay * step))
    session.models[model].scheduler = divided


@operation
def prepare(session: Session, model: str) -> dict[str, bool]:
    """prepare((model, optimizer, scheduler)); whether it returns the caller's own objects."""
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
def prepare_shapes(session: Session, arguments: list[object]) -> object:
    """prepare with several arguments at once; the structure of the result.

    Each argument is "model", "triple", "none", "empty triple", or a list of these.
    """
    return _structure(session.strategy.prepare(*[_argument(session, item) for item in arguments]))


def _argument(session: Session, item: object) -> object:
    if isinstance(item, list):
        return [_argument(session, part) for part in item]
    if item == "model":
        return models.build("regressor", 1)
    if item == "triple":
        model = models.build("regressor", 2)
        made = session.strategy.create_optimizer(model, lr=1e-3)
        return (model, made, torch.optim.lr_scheduler.LambdaLR(made, lambda step: 1.0))
    return (None, None, None) if item == "empty triple" else None


def _structure(value: object) -> object:
    if isinstance(value, (list, tuple)):
        return [type(value).__name__, *(_structure(item) for item in value)]
    kinds = [
        (nn.Module, "model"),
        (torch.optim.Optimizer, "optimizer"),
        (torch.optim.lr_scheduler.LRScheduler, "scheduler"),
    ]
    return next((name for kind, name in kinds if isinstance(value, kind)), type(value).__name__)


@operation
def prepare_set(
    session: Session, critic: bool, rewards: int, steps: int = 10, prepared: bool = False
) -> dict[str, object]:
    """prepare_models_and_optimizers; the structure of the result, the actor's first learning rate, and the peak learning
    rates of actor and critic. ``prepared``: prepare_model(actor, is_training=True) comes first."""
    reward_models = [models.build("regressor", 10 + index) for index in range(rewards)] if rewards else None
    actor: nn.Module = models.Actor(models.build("language", 1))
    if prepared:
        actor = session.strategy.prepare_model(actor, is_training=True)
    back = session.strategy.prepare_models_and_optimizers(
        actor,
        models.build("regressor", 2) if critic else None,
        reward_models,
        models.build("language", 3),
        None,
        steps,
    )
    peaks = [scheduler.base_lrs[0] for _, _, scheduler in back[:2] if scheduler is not None]
    return {"structure": _structure(back), "rate": back[0][1].param_groups[0]["lr"], "peaks": peaks}


@operation
def unwrapped(session: Session, model: str, times: int = 1) -> dict[str, object]:
    """unwrap_model; the parameter names of the result, and whether it is the original model."""
    entry = session.models[model]
    inner = entry.model
    for _ in range(times):
        inner = session.strategy.unwrap_model(inner)
    names = [name for name, _ in inner.named_parameters()]
    alive = {id(parameter) for parameter in entry.model.parameters()}
    return {
        "same_class": isinstance(inner, type(entry.module)),
        "names": names,
        "same_object": inner is session.strategy.unwrap_model(entry.model),
        "shares_parameters": alive == {id(parameter) for parameter in inner.parameters()},
    }


@operation
def modes(session: Session, model: str) -> list[bool]:
    """The distinct training modes of the model and its parts."""
    return sorted({part.training for part in session.strategy.unwrap_model(session.models[model].model).modules()})


@operation
def set_mode(session: Session, model: str, part: str, training: bool) -> None:
    """Put a part of the model in training or evaluation mode."""
    session.strategy.unwrap_model(session.models[model].model).get_submodule(part).train(training)


@operation
def evaluating(session: Session, model: str) -> list[str]:
    """The names of the parts that are in evaluation mode."""
    module = session.strategy.unwrap_model(session.models[model].model)
    return [name for name, part in module.named_modules() if not part.training]


@operation
def buffers(session: Session, model: str) -> dict[str, torch.Tensor]:
    """The buffers of a model, before or after preparing."""
    inner = session.strategy.unwrap_model(session.models[model].model)
    return {name: buffer.detach().cpu().clone() for name, buffer in inner.named_buffers()}


@operation
def freeze(session: Session, model: str, part: str, trainable: bool = False) -> None:
    """Freeze a part of the model, or let it train again."""
    session.strategy.unwrap_model(session.models[model].model).get_submodule(part).requires_grad_(trainable)


@operation
def hook(session: Session, model: str, parameter: str) -> None:
    """Register a gradient hook on a parameter of a model: every other row of the gradient becomes zero."""
    weight = session.strategy.unwrap_model(session.models[model].model).get_parameter(parameter)
    weight.register_hook(models.every_other_row)


@operation
def uninitialized(session: Session, model: str) -> list[str]:
    """The parameters and buffers that are on the meta device or not finite."""
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
    **more: Any,
) -> None:
    """setup_dataloader over the numbers 0 to ``samples`` - 1."""
    data = list(range(samples))
    session.memory[name] = session.strategy.setup_dataloader(
        data, batch_size, shuffle=shuffle, drop_last=drop_last, consumed_samples=consumed, **more
    )


@operation
def batches(session: Session, name: str, epoch: int | None = None, first: int | None = None) -> dict[str, object]:
    """The samples of all batches on this rank, or of the ``first`` ones, and the position afterwards."""
    data_loader = session.memory[name]
    if epoch is not None:
        data_loader.set_epoch(epoch)
    seen = []
    for index, batch in enumerate(data_loader):
        if first is not None and index == first:
            break
        seen.append(batch.tolist())
        if first is not None and index == first - 1:
            break
    return {"batches": seen, "consumed": data_loader.consumed_samples}


@operation
def resume(session: Session, name: str, consumed: int, epoch: int | None = None) -> dict[str, object]:
    """The remaining samples of ``epoch`` after ``consumed`` samples, or those from the position of the loader on."""
    data_loader = session.memory[name]
    if epoch is not None:
        data_loader.set_epoch(epoch, consumed)
    return {"batches": [batch.tolist() for batch in data_loader]}
