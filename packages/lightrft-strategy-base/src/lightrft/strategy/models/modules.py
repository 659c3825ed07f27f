"""Functions on the caller's modules: actor wrappers, copies without weights, the context of a forward pass."""

import copy
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import nn

from lightrft.config import StrategyError, UnsupportedOperationError
from lightrft.strategy.backend.modules import tensors_of
from lightrft.strategy.distributed.world import World
from lightrft.strategy.models.registry import inner_model

_REGISTERED = frozenset({"_parameters", "_buffers", "_modules", "_compiled_call_impl"})
"""Attributes in which torch keeps what a module consists of, and which it copies in its own way."""


def check_actor(model: nn.Module) -> None:
    """Raise `StrategyError` if an actor has trainable parameters outside its ``.model``: nothing would train them."""
    inner = {id(parameter) for parameter in inner_model(model).parameters()}
    outside = [
        name for name, parameter in model.named_parameters() if parameter.requires_grad and id(parameter) not in inner
    ]
    if outside:
        raise StrategyError(
            f"prepare: expected every trainable parameter of the actor {type(model).__name__} inside its .model, got others, "
            f"which would never be updated: {', '.join(outside[:3])}. Move them into .model, or freeze them"
        )


def check_gradients(module: nn.Module) -> None:
    """Raise `UnsupportedOperationError` for parameters whose gradients no strategy can average and clip."""
    imaginary = [
        name for name, parameter in module.named_parameters() if parameter.requires_grad and parameter.is_complex()
    ]
    if imaginary:
        raise UnsupportedOperationError(
            f"prepare: expected real parameters, got complex ones that train in {type(module).__name__}: "
            f"{', '.join(imaginary[:3])}. Store real and imaginary parts as real parameters, see torch.view_as_complex"
        )
    sparse = [
        name for name, part in module.named_modules()
        if isinstance(part, (nn.Embedding, nn.EmbeddingBag)) and part.sparse and part.weight.requires_grad
    ]  # fmt: skip
    if sparse:
        raise UnsupportedOperationError(
            f"prepare: expected dense gradients, got embeddings with sparse=True in {type(module).__name__}: "
            f"{', '.join(sparse[:3])}. Use sparse=False"
        )


def schema_of(module: nn.Module) -> list[list[object]]:
    """Return name, dtype, shape and trainability of every parameter and buffer, which must be the same on all ranks."""
    return [
        [
            name,
            str(tensor.dtype).removeprefix("torch."),
            list(tensor.shape),
            "trains" if tensor.requires_grad else "frozen",
        ]
        for name, tensor in tensors_of(module)
    ]


def check_attributes(module: nn.Module) -> None:
    """Raise `StrategyError` for tensors on the meta device that are plain attributes: they get no values from rank 0."""
    missing = [
        f"{path}.{name}".removeprefix(".")
        for path, part in module.named_modules()
        for name, value in vars(part).items()
        if name not in _REGISTERED and any(isinstance(item, torch.Tensor) and item.is_meta for item in _items(value))
    ]
    if missing:
        raise StrategyError(
            f"prepare: expected a {type(module).__name__} whose tensors are parameters or buffers, which get rank 0's values, "
            f"got plain attributes on the meta device: {', '.join(missing[:3])}. Register them with register_buffer "
            f"(persistent=False keeps them out of checkpoints), make them with device='cpu', or build the model without "
            f"meta_init"
        )


def _items(value: object) -> Iterable[object]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, (list, tuple)) else (value,)


def upcast_trainable(module: nn.Module) -> None:
    """Convert trainable parameters of fewer than 32 bits to fp32, in place: updates accumulate in them."""
    for parameter in module.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()


def meta_copy(module: nn.Module) -> nn.Module:
    """Return a copy of ``module`` whose parameters and buffers are on the meta device, tied ones still tied.

    Raises:
        StrategyError: The model holds something that cannot be copied.
    """
    memo: dict[int, torch.Tensor] = {}
    for _, tensor in tensors_of(module):
        empty = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    try:
        return copy.deepcopy(module, dict(memo))
    except Exception as error:  # what the attributes of the model raise
        held = _not_copyable(module, memo)
        what = f"{held[0]} ({type(held[1]).__name__})" if held else "something"
        raise StrategyError(
            f"prepare: expected a model in training that can be copied (copy.deepcopy, without its weights), got "
            f"{type(module).__name__}, whose {what} cannot: {error}. Keep locks, open files, process groups and tensors "
            f"with a graph outside of the model, or set them after preparing"
        ) from error


def _not_copyable(module: nn.Module, memo: Mapping[int, torch.Tensor]) -> tuple[str, object] | None:
    """Return the path and the value of the first attribute in ``module`` that cannot be copied."""
    for path, part in module.named_modules():
        for name, value in vars(part).items():
            if name not in _REGISTERED and not _can_be_copied(value, memo):
                return f"{path}.{name}".removeprefix("."), value
    return None


def _can_be_copied(value: object, memo: Mapping[int, torch.Tensor]) -> bool:
    try:
        copy.deepcopy(value, dict(memo))
    except Exception:  # noqa: BLE001 - whatever an attribute of the caller raises
        return False
    return True


def with_buffers_of(meta_model: nn.Module, module: nn.Module) -> nn.Module:
    """Return a copy of ``meta_model`` with the buffers of ``module``, since checkpoints do not hold all buffers."""
    result = copy.deepcopy(meta_model)
    for path, owner in module.named_modules():
        for name, buffer in owner._buffers.items():
            if buffer is not None:
                result.get_submodule(path)._buffers[name] = buffer.detach().clone()
    return result


def check_materialized(module: nn.Module, world: World) -> None:
    """Raise `StrategyError` if rank 0, which sends its weights to the others, has tensors on the meta device."""
    missing = [name for name, tensor in tensors_of(module) if tensor.is_meta]
    if world.rank == 0 and missing:
        raise StrategyError(
            f"prepare: expected a {type(module).__name__} with values on rank 0, got {len(missing)} tensors on the meta device "
            f"({', '.join(missing[:3])}). Build the model inside strategy.init_model_context(meta_init=True), which gives "
            f"it memory on rank 0"
        )


def wrap_forward(
    module: nn.Module, context: Callable[[], AbstractContextManager[object]], check_zero_grad: Callable[[], None]
) -> Callable[[], None]:
    """Enter ``context()`` around every forward pass of ``module``, its hooks included, and check each ``zero_grad``.

    Replaces the class of this instance by a subclass of the same name, as FSDP2 does, because torch has no hook that
    does the same:

    - Forward hooks, with ``always_call=True`` too, are not called on a `KeyboardInterrupt`, which would leave autocast on, and
      cannot name the call in the error of another hook, such as one that gathers parameters.
    - The attribute ``_compiled_call_impl`` replaces the call of one instance, but ``module.compile()`` overwrites it.
    - ``forward`` as an attribute of the instance runs inside the hooks.
    - ``zero_grad`` has no hook.

    ``isinstance``, the class's name and the state dict are unchanged.

    Returns:
        A function that undoes this.
    """
    original: type[nn.Module] = type(module)

    def __call__(self: nn.Module, *args: object, **kwargs: object) -> Any:
        with context():
            return original.__call__(self, *args, **kwargs)

    def zero_grad(self: nn.Module, set_to_none: bool = True) -> None:
        check_zero_grad()
        original.zero_grad(self, set_to_none)

    body = {
        "__call__": __call__,
        "zero_grad": zero_grad,
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
    }
    module.__class__ = type(original.__name__, (original,), body)

    def undo() -> None:
        module.__class__ = original

    return undo


def refuse_save_pretrained(module: nn.Module, class_name: str) -> None:
    """Make ``save_pretrained`` of ``module`` and its submodules raise: they are sharded, and it would write the shards.

    This also holds after the strategy is closed, since the parameters stay sharded.

    Args:
        module: A prepared model.
        class_name: Name of its class before wrapping.
    """
    _refuse_method(module, "save_pretrained", partial(_refuse_save_pretrained, class_name))


def refuse_rank_allocation(module: nn.Module, class_name: str) -> Callable[[], None]:
    """Make ``update_and_allocate`` of AdaLoRA in ``module`` raise: it reads gradients that the update has cleared.

    Returns:
        A function that undoes this.
    """
    return _refuse_method(module, "update_and_allocate", partial(_refuse_rank_allocation, class_name))


def _refuse_method(module: nn.Module, name: str, refuse: Callable[..., None]) -> Callable[[], None]:
    """Replace the method ``name`` by ``refuse`` in each part of ``module`` that has it. Return what undoes this."""
    parts = [part for part in module.modules() if hasattr(type(part), name)]
    for part in parts:
        vars(part)[name] = refuse

    def undo() -> None:
        for part in parts:
            vars(part).pop(name, None)

    return undo


def _refuse_rank_allocation(class_name: str, *_: object, **__: object) -> None:
    raise UnsupportedOperationError(
        f"update_and_allocate: expected adapters of fixed ranks, got AdaLoRA in {class_name}, which chooses ranks by full "
        f"gradients after the step; optimizer_step clears them, and strategies shard them. Leave the call out to train with "
        f"init_r, or use LoRA"
    )


def _refuse_save_pretrained(class_name: str, *_: object, **__: object) -> None:
    raise StrategyError(
        f"save_pretrained: expected a model with all of its weights, got a prepared {class_name}, of which each rank holds a "
        f"part. Call strategy.save_model(model, tokenizer, directory) on every rank, before the strategy is closed"
    )
