"""An optimizer's state by parameter name, whatever its keys are: parameters, DTensors, or flat partitions of many.

`Backend._state_slices` says where the optimizer keeps the state of which range of which parameter; the rest is
here. State of a parameter's own shape is stored in ranges; what is one number, such as ``step``, whole.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer

from lightrft.config import CheckpointError, UnsupportedOperationError
from lightrft.strategy import flat
from lightrft.strategy.checkpoint.plain_values import from_json, to_json
from lightrft.strategy.distributed.dtensors import own_part
from lightrft.strategy.shards import Shard, StateSlice
from lightrft.strategy.training.trained_model import TrainedModel

IMPLEMENTATION = frozenset({"params", "foreach", "fused", "capturable", "differentiable"})
"""What of a parameter group says how, and not what, to compute."""


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of ``tensor``, a view; see `flat.elements`."""
    return flat.elements(own_part(tensor.detach()))


# Saving


def held(optimizer: Optimizer, slices: Sequence[StateSlice]) -> Iterator[Shard]:
    """What this rank holds of the state; named ``KIND/PARAMETER``, such as ``exp_avg/layers.0.weight``."""
    for part in slices:
        for kind, value in optimizer.state.get(part.key, {}).items():
            if value is not None:
                yield _shard(part, kind, value)


def _shard(part: StateSlice, kind: str, value: Any) -> Shard:
    name, parameter = f"{kind}/{part.shard.name}", part.shard
    if isinstance(value, (bool, int, float)):
        return Shard(name=name, shape=torch.Size(), offset=0, values=torch.tensor([value], dtype=_number_type(value)))
    if isinstance(value, torch.Tensor) and "/" not in kind:
        if value.ndim == 0 and (kind == "step" or parameter.shape):
            return Shard(name=name, shape=torch.Size(), offset=0, values=value.detach().view(1))
        values, own = local(value), local(part.key)
        if values.numel() == own.numel():
            return part.of(values, name)
        if part.whole:
            return Shard(name=name, shape=value.shape, offset=0, values=values)
    raise UnsupportedOperationError(
        f"save_ckpt: the optimizer keeps {kind!r} of {parameter.name} as {_described(value)}, which is neither a number nor "
        f"of the parameter's shape ({tuple(parameter.shape)}), and cannot be stored from shards"
    )


def _number_type(value: float) -> torch.dtype:
    return torch.float64 if isinstance(value, float) else torch.int64


def _described(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"


def groups(trained: TrainedModel) -> list[dict[str, Any]]:
    """The parameter groups as JSON values: names, and hyperparameters."""
    return [
        {
            "names": names,
            "settings": {
                key: to_json(_number(value), f"param_groups[{index}][{key!r}]", exact=False)
                for key, value in group.items()
                if key not in IMPLEMENTATION
            },
        }
        for index, (names, group) in enumerate(zip(trained.group_names, trained.optimizer.param_groups, strict=True))
    ]


def _number(value: Any) -> Any:
    return value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value


# Loading

Stored = Mapping[str, torch.Size]
"""Shapes of what is stored, by ``KIND/PARAMETER``."""


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """State to be made for one key of the optimizer's."""

    key: torch.Tensor
    slices: list[StateSlice]
    kinds: list[str]
    numbers_with_key: bool
    """Whether its numbers are kept on the key's device, and not on the CPU."""


def plan(optimizer: Optimizer, slices: Sequence[StateSlice], stored: Stored) -> list[Allocation]:
    """What is to be made, for each key, in the order of the optimizer's groups, in which it makes its state itself.

    Raises `CheckpointError` where the stored state does not fit the keys.
    """
    kinds_of: dict[str, list[str]] = {}
    for name in stored:
        kind, _, parameter = name.partition("/")
        kinds_of.setdefault(parameter, []).append(kind)
    by_key: dict[int, list[StateSlice]] = {}
    for part in slices:
        by_key.setdefault(id(part.key), []).append(part)
    group_of = {id(key): group for group in optimizer.param_groups for key in group["params"]}
    order = {key: place for place, key in enumerate(group_of)}
    return [
        _allocation(by_key[key], kinds_of, stored, _keeps_numbers_with_key(group_of.get(key, {})))
        for key in sorted(by_key, key=lambda it: order.get(it, len(order)))
    ]


def _keeps_numbers_with_key(group: Mapping[str, Any]) -> bool:
    return bool(group.get("capturable") or group.get("fused"))


def _allocation(
    parts: list[StateSlice], kinds_of: Mapping[str, list[str]], stored: Stored, numbers_with_key: bool
) -> Allocation:
    first = parts[0].shard.name
    kinds = sorted(kinds_of.get(first, []))
    for part in parts:
        name = part.shard.name
        if sorted(kinds_of.get(name, [])) != kinds:
            raise CheckpointError(
                f"the optimizer keeps {first} and {name} together, and the checkpoint has other state for the one "
                f"({', '.join(kinds) or 'none'}) than for the other; load it with a strategy that keeps them apart"
            )
        for kind in kinds:
            shape = stored[f"{kind}/{name}"]
            if shape not in (torch.Size(), part.shard.shape) and not part.whole:
                raise CheckpointError(
                    f"{kind} of {name} has shape {tuple(shape)} there, and cannot be split into shards"
                )
    return Allocation(key=parts[0].key, slices=parts, kinds=kinds, numbers_with_key=numbers_with_key)


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """Values, as they are stored, of what is one number."""

    values: dict[str, torch.Tensor]
    """By ``KIND/PARAMETER``."""
    same_optimizer: bool
    """Whether an optimizer of the same class stored them."""


@dataclass(frozen=True, kw_only=True)
class Types:
    """Of what is stored."""

    state: Mapping[str, torch.dtype]
    """By ``KIND/PARAMETER``."""
    parameters: Mapping[str, torch.dtype]

    def wanted(self, kind: str, parameter: str, key: torch.Tensor) -> torch.dtype:
        """The type for ``key``'s state: that of the key, if it was that of the parameter, as torch has it; else its own."""
        found = self.state[f"{kind}/{parameter}"]
        follows = found.is_floating_point and found == self.parameters.get(parameter) and key.is_floating_point()
        return key.dtype if follows else found


def allocate(optimizer: Optimizer, allocation: Allocation, stored: Stored, types: Types, numbers: Numbers) -> Iterator[Shard]:  # fmt: skip
    """Make the state of one key: numbers at once, tensors unless they are there. Yields the shards that are to be filled."""
    made: dict[str, Any] = {}
    there = optimizer.state.get(allocation.key, {})
    for kind in allocation.kinds:
        parameter = allocation.slices[0].shard.name
        first = f"{kind}/{parameter}"
        if first in numbers.values:
            made[kind] = _as_number(optimizer, allocation, numbers.values[first], numbers.same_optimizer)
        elif stored[first] in (torch.Size(), allocation.slices[0].shard.shape):
            made[kind] = _state_tensor(allocation, types.wanted(kind, parameter, allocation.key), there.get(kind))
            whole = local(made[kind])
            for part in allocation.slices:
                yield part.of(whole, f"{kind}/{part.shard.name}")
        else:
            made[kind] = torch.zeros(
                stored[first], dtype=types.wanted(kind, parameter, allocation.key), device=allocation.key.device
            )
            yield Shard(name=first, shape=stored[first], offset=0, values=made[kind].view(-1))
    if made:
        optimizer.state[allocation.key] = made
    else:
        optimizer.state.pop(allocation.key, None)


def _state_tensor(allocation: Allocation, dtype: torch.dtype, there: Any) -> torch.Tensor:
    """Memory of the key's form: ``there`` itself where it is that. What will not be filled, such as padding, is zero."""
    key = allocation.key
    if isinstance(there, type(key.data)) and _form(there) == (key.shape, key.stride(), key.device, dtype):
        return there
    filled = sum(part.shard.values.numel() for part in allocation.slices)
    make = torch.empty_like if filled == local(key).numel() else torch.zeros_like
    return make(key, dtype=dtype, requires_grad=False)


def _form(tensor: torch.Tensor) -> tuple[object, ...]:
    return tensor.shape, tensor.stride(), tensor.device, tensor.dtype


def is_number(name: str, shape: torch.Size, parameter: torch.Size) -> bool:
    """Whether what is stored as ``name`` is one number, and not the state of a parameter that is one."""
    return not shape and (name.startswith("step/") or bool(parameter))


def _as_number(optimizer: Optimizer, allocation: Allocation, stored: torch.Tensor, same: bool) -> Any:
    """As this optimizer keeps it: torch's own keep tensors, DeepSpeed's Python numbers."""
    was_python = stored.dtype in (torch.int64, torch.float64)
    torch_own = type(optimizer).__module__.startswith("torch.optim")
    if was_python if same else not torch_own:
        number = stored.item()
        return int(number) if float(number).is_integer() and not same else number
    value = stored.to(torch.float32) if was_python else stored
    return value.to(allocation.key.device) if allocation.numbers_with_key else value


def restore_groups(trained: TrainedModel, stored: Sequence[Mapping[str, Any]], same_optimizer: bool) -> None:
    """Give the groups, found by their parameters' names, their hyperparameters."""
    by_names = {frozenset(group["names"]): group["settings"] for group in stored}
    for names, group in zip(trained.group_names, trained.optimizer.param_groups, strict=True):
        for key, value in by_names[frozenset(names)].items():
            if key in group or same_optimizer:
                _set(group, key, from_json(value))


def _set(group: dict[str, Any], key: str, value: Any) -> None:
    if isinstance(group.get(key), torch.Tensor):
        group[key].fill_(value)
    else:
        group[key] = value


def check_groups(trained: TrainedModel, stored: Sequence[Mapping[str, Any]]) -> None:
    """Raise `CheckpointError` unless the parameters are grouped as they were."""
    there, here = {frozenset(group["names"]) for group in stored}, {frozenset(names) for names in trained.group_names}
    if there != here:
        raise CheckpointError(
            f"the optimizer's parameters are in groups of {sorted(map(len, here))} that do not match those of the checkpoint, "
            f"of {sorted(map(len, there))}; make the optimizer as it was, or pass load_optimizer_states=False"
        )
