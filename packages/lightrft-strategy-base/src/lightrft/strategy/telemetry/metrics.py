"""The metrics that a script logs: checked, flattened to names such as "reward/mean", and moved to the host."""

import numbers
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from lightrft.config import ArgumentError, ArgumentTypeError
from lightrft.config.validation import shown
from lightrft.strategy.tensors import grouped, is_dtensor

Metric = int | float | torch.Tensor
"""A number, or a tensor of one number, which may be on the device."""
RESERVED = ("step", "time")
"""Names that trackers write in addition to the metrics."""


def flatten(metrics: object) -> dict[str, Metric]:
    """Return ``metrics``, an argument of `log`, by name. Does not wait for the device.

    Raises:
        ArgumentTypeError, ArgumentError: Something in it is not a number, or two metrics have one name.
    """
    if not isinstance(metrics, Mapping):
        raise ArgumentTypeError(
            f"log: expected metrics to be a dict of numbers by name, got {shown(metrics)}. Pass for example "
            f"{{'reward': reward}}"
        )
    flat: dict[str, Metric] = {}
    for name, value in _leaves("", metrics):
        if name in RESERVED or name in flat:
            reason = "which trackers write themselves" if name in RESERVED else "twice"
            raise ArgumentError(f"log: expected each metric to have its own name, got {name!r}, {reason}. Rename it")
        flat[name] = _checked(name, value)
    return flat


def _leaves(prefix: str, metrics: Mapping[Any, object]) -> Iterator[tuple[str, object]]:
    for name, value in metrics.items():
        if not isinstance(name, str) or not name:
            raise ArgumentTypeError(
                f"log: expected the name of a metric to be a non-empty string, got {shown(name)}{prefix and f' in {prefix!r}'}"
            )
        if isinstance(value, Mapping):
            yield from _leaves(f"{prefix}{name}/", value)
        else:
            yield f"{prefix}{name}", value


def _checked(name: str, value: object) -> Metric:
    if isinstance(value, torch.Tensor):
        return _checked_tensor(name, value)
    if isinstance(value, bool):
        raise _refusal(name, value, "Pass int(value)")
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    raise _refusal(name, value, "Leave it out, or pass a number")


def _checked_tensor(name: str, value: torch.Tensor) -> torch.Tensor:
    if value.numel() != 1:
        raise _refusal(name, value, "Reduce it, for example with .mean()")
    if value.is_complex() or value.dtype is torch.bool or value.is_meta:
        raise _refusal(name, value, "Pass a number")
    if is_dtensor(value):
        raise ArgumentTypeError(
            f"log: expected {name!r} to be a number, got a DTensor, which one rank alone cannot read. Pass "
            f"value.full_tensor(), which all ranks must call"
        )
    return value.detach()


def _refusal(name: str, value: object, remedy: str) -> ArgumentTypeError:
    got = shown(value)
    if isinstance(value, torch.Tensor):
        got = f"a tensor of shape {tuple(value.shape)}, {value.dtype} on {value.device}"
    return ArgumentTypeError(f"log: expected {name!r} to be a number or a tensor of one number, got {got}. {remedy}")


def on_host(metrics: Mapping[str, Metric]) -> dict[str, int | float]:
    """Return the values of ``metrics`` in their order. Waits once for each device that has some."""
    remote = grouped(
        (value.device, (name, value))
        for name, value in metrics.items()
        if isinstance(value, torch.Tensor) and value.device.type != "cpu"
    )
    read: dict[str, int | float] = {}
    for tensors in remote.values():
        stacked = torch.stack([value.detach().reshape(()).double() for _, value in tensors])
        read.update(zip((name for name, _ in tensors), stacked.tolist(), strict=True))
    return {name: read[name] if name in read else _number(value) for name, value in metrics.items()}


def _number(value: Metric) -> int | float:
    return value.item() if isinstance(value, torch.Tensor) else value
