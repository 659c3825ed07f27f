"""Tests whether a backend can step an optimizer on parts of parameters, by running a copy of it on small tensors.

An optimizer that treats each element independently updates a part of a matrix as it updates the whole matrix. One that
factors second moments (Adafactor), orthogonalizes (Muon) or scales by a norm (LARS) does not, and raises no error.
"""

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lightrft.config import StrategyError
from lightrft.strategy.backend.types import parameters_of
from lightrft.strategy.tensors import elements, local_part

Partition = Callable[[list[torch.Tensor]], list[list[torch.Tensor]]]
"""Distributes the full tensors of a parameter group over one or several optimizers; returns the parts of each."""

STEPS = 4
EDGE = 256
RATE = 1e-2
TOLERANCE = 1e-3
"""Largest difference between the updates of the parts and of the full tensors, relative to the largest update."""

_NOT_COPIED = ("state", "param_groups", "step", "zero_grad", "add_param_group")
"""Attributes that are not copied to a replica; schedulers replace ``step`` on the object."""


def check_elementwise(
    optimizer: Optimizer,
    partition: Partition,
    ndim_of: Callable[[torch.Tensor], int],
    *,
    device: torch.device,
    refusal: str,
) -> None:
    """Raise `StrategyError` unless ``optimizer`` updates parts of parameters as it updates full parameters.

    Every kind of parameter group is tried for several steps, with a learning rate above 0 (a schedule may begin at 0).

    Args:
        optimizer: The caller's optimizer; it does not change.
        partition: How the backend distributes parameters over optimizers; must be linear, since gradients and results are
            distributed in the same way.
        ndim_of: Returns the number of dimensions of a full parameter.
        device: The device to compute on.
        refusal: For the message: what the optimizer gets, and the remedy.
    """
    name = type(optimizer).__name__
    for group, ndims in _kinds(optimizer, ndim_of):
        try:
            difference = _difference(optimizer, group, _shapes(ndims), partition, device)
        except Exception as error:  # an optimizer may raise anything
            raise StrategyError(
                f"prepare: expected an optimizer that can step on parts of parameters, got {name}, which raised "
                f"{type(error).__name__} when it was tried: {' '.join(str(error).split())[:200]}. {refusal}"
            ) from error
        if not difference <= TOLERANCE:
            raise StrategyError(
                f"prepare: expected an optimizer that updates element by element, got {name}: its updates of parts of "
                f"a parameter differ from those of the whole parameter (relative error {difference:.2g}). {refusal}"
            )


def replica(optimizer: Optimizer, group: dict[str, Any], parameters: list[torch.Tensor]) -> Optimizer:
    """Return a copy of ``optimizer`` without state or hooks, which has ``parameters`` in one group like ``group``.

    Raises:
        TypeError: The optimizer frees something when it is deleted, which a copy would free too.
    """
    if hasattr(type(optimizer), "__del__"):
        raise TypeError(f"{type(optimizer).__name__} has a __del__ method, so it cannot be copied")
    made = type(optimizer).__new__(type(optimizer))
    memo: dict[int, Any] = {id(optimizer): made, **{id(parameter): parameter for parameter in parameters_of(optimizer)}}
    attributes = {
        key: value
        for key, value in vars(optimizer).items()
        if key not in _NOT_COPIED and not (key.startswith("_optimizer_") and key.endswith("_hooks"))
    }
    vars(made).update(copy.deepcopy(attributes, memo))
    settings = {key: copy.deepcopy(value, memo) for key, value in group.items() if key not in ("params", "param_names")}
    if isinstance(optimizer, torch.optim.Adagrad):  # makes its state in the constructor
        return type(optimizer)(parameters, **{key: settings[key] for key in optimizer.defaults})
    made.__setstate__({"state": defaultdict(dict), "param_groups": [{**settings, "params": parameters}]})
    return made


def _kinds(
    optimizer: Optimizer, ndim_of: Callable[[torch.Tensor], int]
) -> Iterator[tuple[dict[str, Any], tuple[int, ...]]]:
    """Yield one group of each kind: groups of the same kind differ only in their parameters and learning rates."""
    seen = set()
    for group in optimizer.param_groups:
        ndims = tuple(sorted({ndim_of(parameter) for parameter in group["params"]}))
        settings = sorted((key, repr(value)) for key, value in group.items() if key not in ("params", "param_names"))
        kind = (ndims, *((key, value) for key, value in settings if not key.endswith("lr")))
        if ndims and kind not in seen:
            seen.add(kind)
            yield group, ndims


def _shapes(ndims: Sequence[int]) -> list[tuple[int, ...]]:
    """Return two shapes for each number of dimensions: matrices large enough for what optimizers do to matrices."""
    return [
        (rows, EDGE, *[1] * (ndim - 2)) if ndim > 1 else (rows,) * ndim for ndim in ndims for rows in (EDGE, 2 * EDGE)
    ]


def _difference(
    optimizer: Optimizer,
    group: dict[str, Any],
    shapes: Sequence[tuple[int, ...]],
    partition: Partition,
    device: torch.device,
) -> float:
    """Return the largest difference between the results on parts and on full tensors, over the largest update."""
    stream = torch.Generator().manual_seed(0)
    start = [_uneven(shape, stream).to(device) for shape in shapes]
    gradients = [[_uneven(shape, stream).to(device) for shape in shapes] for _ in range(STEPS)]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        stepped = _stepped(optimizer, group, start, gradients)
        parts_of_steps = [partition(tensors) for tensors in gradients]
        parts = [
            _stepped(optimizer, group, tensors, [step[index] for step in parts_of_steps])
            for index, tensors in enumerate(partition(start))
        ]
    largest = max(float((after - before).abs().max()) for after, before in zip(stepped, start, strict=True))
    furthest = max(
        (
            float((_local(part) - _local(expected)).abs().max())
            for got, wanted in zip(parts, partition(stepped), strict=True)
            for part, expected in zip(got, wanted, strict=True)
            if _local(part).numel()
        ),
        default=0.0,
    )
    return furthest / largest if largest else float(furthest > 0)


def _uneven(shape: tuple[int, ...], stream: torch.Generator) -> torch.Tensor:
    """Return values whose size grows along dim 0, so that statistics of the parts differ."""
    values = torch.randn(shape, generator=stream)
    return values * torch.linspace(0.1, 2, shape[0]).view(-1, *[1] * (len(shape) - 1)) if shape else values


def _stepped(
    optimizer: Optimizer, group: dict[str, Any], start: Sequence[torch.Tensor],
    gradients: Sequence[Sequence[torch.Tensor]],
) -> list[torch.Tensor]:  # fmt: skip
    """Return the values that a replica reaches from ``start`` with ``gradients``."""
    parameters: list[torch.Tensor] = [nn.Parameter(tensor.clone()) for tensor in start]
    stepping = replica(optimizer, {**group, **_rate(group.get("lr"))}, parameters)
    for step in gradients:
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = gradient.clone()
        stepping.step()
    return [parameter.detach() for parameter in parameters]


def _rate(rate: object) -> dict[str, Any]:
    """Return a learning rate whose updates exceed rounding errors; empty for an optimizer that chooses its own."""
    if isinstance(rate, torch.Tensor):
        return {"lr": rate.detach().clone().clamp(min=RATE)}
    return {"lr": max(rate, RATE)} if isinstance(rate, (int, float)) else {}


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return elements(local_part(tensor.detach()))
