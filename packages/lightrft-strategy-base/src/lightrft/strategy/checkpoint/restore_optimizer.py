"""Restoring an optimizer's state for any kind of keys: parameters, DTensors, or flat partitions of many parameters.

`Backend.state_slices` says where the optimizer keeps the state of which range of which parameter. First `plan` and
`check_groups` compare the stored state with the optimizer; then `allocate` makes the memory, which the caller fills, and
`restore_groups` sets the hyperparameters. Names of states are such as exp_avg or step; a single number is stored whole.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lightrft.config import CheckpointError
from lightrft.strategy.backend.optimizer_probe import replica
from lightrft.strategy.backend.types import Shard, StateSlice, TrainedModel
from lightrft.strategy.storage.safe_json import from_json
from lightrft.strategy.tensors import elements, grouped, local_part

Stored = Mapping[str, torch.Size]
"""Shapes of the stored tensors, by ``STATE/PARAMETER``."""


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """The state to be made for one key of the optimizer."""

    key: torch.Tensor
    slices: list[StateSlice]
    states: list[str]
    numbers_on_device: bool
    """Whether numbers are kept on the device of the key, not on the CPU."""
    made: Mapping[str, Any]
    """The state that the optimizer makes itself for such a key, if that is known: the form of the numbers in it."""


def plan(optimizer: Optimizer, slices: Sequence[StateSlice], stored: Stored) -> list[Allocation]:
    """Return what is to be made for each key, in the order in which the optimizer makes its state itself.

    Raises:
        CheckpointError: The stored state does not fit the keys.
    """
    split_names = (name.partition("/") for name in stored)
    states_of = grouped((parameter, state) for state, _, parameter in split_names)
    by_key = grouped((id(part.key), part) for part in slices)
    group_of = {id(key): group for group in optimizer.param_groups for key in group["params"]}
    order = {key: index for index, key in enumerate(group_of)}
    forms: dict[tuple[int, int], Mapping[str, Any]] = {}
    allocations = []
    for identity in sorted(by_key, key=lambda identity: order.get(identity, len(order))):
        group, key = group_of.get(identity, {}), by_key[identity][0].key
        if (id(group), key.ndim) not in forms:
            forms[id(group), key.ndim] = _state_made(optimizer, group, key)
        allocations.append(
            _allocation(
                by_key[identity], states_of, stored, _keeps_numbers_on_device(group), forms[id(group), key.ndim]
            )
        )
    return allocations


def _state_made(optimizer: Optimizer, group: dict[str, Any], key: torch.Tensor) -> Mapping[str, Any]:
    """Return the state that a step of a copy of ``optimizer`` makes for a tensor like ``key``; empty if it cannot be tried."""
    parameter = nn.Parameter(torch.ones([2] * key.ndim, dtype=key.dtype, device=key.device))
    parameter.grad = torch.ones_like(parameter)
    try:
        copied = replica(optimizer, group, [parameter])
        copied.step()
    except Exception:  # noqa: BLE001 - an optimizer may raise anything
        return {}
    made: Mapping[str, Any] = copied.state[parameter]
    return made


def _keeps_numbers_on_device(group: Mapping[str, Any]) -> bool:
    return bool(group.get("capturable") or group.get("fused"))


def _allocation(
    parts: list[StateSlice], states_of: Mapping[str, list[str]], stored: Stored, numbers_on_device: bool,
    made: Mapping[str, Any],
) -> Allocation:  # fmt: skip
    first = parts[0].shard.name
    states = sorted(states_of.get(first, []))
    for part in parts:
        name = part.shard.name
        if sorted(states_of.get(name, [])) != states:
            raise CheckpointError(
                f"expected the same optimizer state for {first} and {name}, which this optimizer stores in one tensor, got "
                f"{', '.join(states) or 'none'} and {', '.join(sorted(states_of.get(name, []))) or 'none'}. Load it with a strategy "
                f"whose optimizer stores them separately"
            )
        for state in states:
            shape = stored[f"{state}/{name}"]
            if shape not in (torch.Size(), part.shard.shape) and not part.is_full:
                raise CheckpointError(
                    f"expected {state} of {name} to have the parameter's shape {tuple(part.shard.shape)}, got {tuple(shape)}, "
                    f"which cannot be sharded. Load it with a strategy that does not shard"
                )
    return Allocation(key=parts[0].key, slices=parts, states=states, numbers_on_device=numbers_on_device, made=made)


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """Stored values of states that are single numbers."""

    values: dict[str, torch.Tensor]
    """By ``STATE/PARAMETER``."""
    same_optimizer: bool
    """Whether an optimizer of the same class stored them."""


@dataclass(frozen=True, kw_only=True)
class StoredTypes:
    """Dtypes of stored tensors."""

    states: Mapping[str, torch.dtype]
    """By ``STATE/PARAMETER``."""
    parameters: Mapping[str, torch.dtype]

    def of(self, state: str, parameter: str, key: torch.Tensor) -> torch.dtype:
        """Return the dtype for the state of ``key``: the key's, if it was saved in the parameter's dtype, as in torch."""
        dtype = self.states[f"{state}/{parameter}"]
        follows = dtype.is_floating_point and dtype == self.parameters.get(parameter) and key.is_floating_point()
        return key.dtype if follows else dtype


def allocate(
    optimizer: Optimizer, allocation: Allocation, stored: Stored, types: StoredTypes, numbers: Numbers
) -> Iterator[Shard]:
    """Make the state of one key, numbers included; yield the shards that the caller fills. Reuses memory that fits."""
    made: dict[str, Any] = {}
    present = optimizer.state.get(allocation.key, {})
    parameter = allocation.slices[0].shard
    for state in allocation.states:
        first = f"{state}/{parameter.name}"
        if first in numbers.values:
            made[state] = _as_number(
                optimizer, allocation, allocation.made.get(state), numbers.values[first], numbers.same_optimizer
            )
            continue
        dtype = types.of(state, parameter.name, allocation.key)
        if stored[first] in (torch.Size(), parameter.shape):
            made[state] = _state_tensor(allocation, dtype, present.get(state))
            values = _local(made[state])
            for part in allocation.slices:
                yield part.of(values, f"{state}/{part.shard.name}")
        else:
            made[state] = torch.zeros(stored[first], dtype=dtype, device=allocation.key.device)
            yield Shard(name=first, shape=stored[first], offset=0, values=made[state].view(-1))
    if made:  # a checkpoint has no entry for None, but the optimizer may read it
        absent = {state: None for state, value in allocation.made.items() if value is None and state not in made}
        optimizer.state[allocation.key] = made | absent
    else:
        optimizer.state.pop(allocation.key, None)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return elements(local_part(tensor.detach()))


def _state_tensor(allocation: Allocation, dtype: torch.dtype, present: object) -> torch.Tensor:
    """Return memory like the key's; reuse ``present`` if it fits. Elements that are not filled, such as padding, are zero."""
    key = allocation.key
    if isinstance(present, type(key.data)) and _layout(present) == (key.shape, key.stride(), key.device, dtype):
        return present
    filled = sum(part.shard.values.numel() for part in allocation.slices)
    make = torch.empty_like if filled == local_part(key).numel() else torch.zeros_like
    return make(key, dtype=dtype, requires_grad=False)


def _layout(tensor: torch.Tensor) -> tuple[object, ...]:
    return tensor.shape, tensor.stride(), tensor.device, tensor.dtype


def is_number(name: str, shape: torch.Size, parameter: torch.Size) -> bool:
    """Return whether what is stored as ``name`` is a single number, not the state of a parameter of one element."""
    return not shape and (name.startswith("step/") or bool(parameter))


def _as_number(
    optimizer: Optimizer, allocation: Allocation, made: object, stored: torch.Tensor, same_optimizer: bool
) -> Any:
    """Return a number in the form of ``made``, which this optimizer makes itself: a tensor, or a Python number.

    If the optimizer could not be tried: torch's own keep tensors, others Python numbers, unless they stored tensors.
    """
    if isinstance(made, torch.Tensor) and made.numel() == 1:
        return stored.to(made.device, made.dtype).reshape(made.shape)
    if isinstance(made, bool):
        return bool(stored.item())
    if isinstance(made, (int, float)):
        return _python_number(stored, prefer_int=isinstance(made, int))
    was_python = stored.dtype in (torch.int64, torch.float64)
    from_torch = type(optimizer).__module__.startswith("torch.optim")
    if was_python if same_optimizer else not from_torch:
        return _python_number(stored, prefer_int=not same_optimizer)
    value = stored.to(torch.float32) if was_python else stored
    return value.to(allocation.key.device) if allocation.numbers_on_device else value


def _python_number(stored: torch.Tensor, *, prefer_int: bool) -> float:
    """Return a Python number; with ``prefer_int``, an int if it is a whole number."""
    number: float = stored.item()
    return int(number) if prefer_int and not isinstance(number, bool) and float(number).is_integer() else number


def check_groups(trained: TrainedModel, stored: Sequence[Mapping[str, Any]]) -> None:
    """Raise `CheckpointError` unless the parameters are grouped as they were."""
    saved = {frozenset(group["names"]) for group in stored}
    current = {frozenset(names) for names in trained.group_names}
    if saved != current:
        raise CheckpointError(
            f"expected parameter groups of {sorted(map(len, saved))} parameters, as in the checkpoint, got groups of "
            f"{sorted(map(len, current))} or of other parameters. Create the optimizer as it was, or pass "
            f"load_optimizer_states=False"
        )


def restore_groups(trained: TrainedModel, stored: Sequence[Mapping[str, Any]], same_optimizer: bool) -> None:
    """Set the hyperparameters of the groups, which are matched by the names of their parameters."""
    by_names = {frozenset(group["names"]): group["settings"] for group in stored}
    for names, group in zip(trained.group_names, trained.optimizer.param_groups, strict=True):
        for key, value in by_names[frozenset(names)].items():
            if key in group or same_optimizer:
                _set(group, key, from_json(value))


def _set(group: dict[str, Any], key: str, value: object) -> None:
    if isinstance(group.get(key), torch.Tensor):
        group[key].fill_(value)
    else:
        group[key] = value
