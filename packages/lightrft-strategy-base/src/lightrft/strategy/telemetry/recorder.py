"""The strategy's own metrics, collected where they occur and written with the next `log`. docs/trackers.md lists them.

Only rank 0 of a run with trackers has a `Recorder`. It reads nothing from the device: it uses numbers that an update reads
anyway. Means, sums and fractions are over what happened since the last `log`.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol
from weakref import WeakKeyDictionary

import torch

from lightrft.strategy.telemetry.memory import measure
from lightrft.strategy.telemetry.metrics import Metric
from lightrft.strategy.telemetry.phases import PhaseTimer


class Counted(Protocol):
    """A model in training."""

    updates: int
    """Updates applied."""


class Update(Protocol):
    """What one `optimizer_step` did; `StepResult`."""

    @property
    def applied(self) -> bool: ...
    @property
    def skipped(self) -> bool: ...
    @property
    def grad_norm(self) -> float | None: ...
    @property
    def denominator(self) -> float | None: ...
    @property
    def loss(self) -> float | None: ...


@dataclass
class _Values:
    """Count, sum and range of values, which are not kept."""

    count: int = 0
    sum: float = 0.0
    least: float = math.inf
    most: float = -math.inf

    def add(self, value: float) -> None:
        self.count, self.sum = self.count + 1, self.sum + value
        self.least, self.most = min(self.least, value), max(self.most, value)

    @property
    def mean(self) -> float:
        return self.sum / self.count


@dataclass
class _Updates:
    """The updates of one model since the last `log`."""

    losses: _Values = field(default_factory=_Values)
    norms: _Values = field(default_factory=_Values)
    skipped: int = 0
    clipped: int = 0
    items: float | None = None


class Recorder:
    """Collects metrics between two calls of `log`, on one rank."""

    def __init__(self, device: torch.device, max_norm: float | None) -> None:
        self._device, self._max_norm = device, max_norm
        self.phases = PhaseTimer(device)
        self._names: WeakKeyDictionary[Counted, str] = WeakKeyDictionary()
        self._updates: dict[str, _Updates] = {}
        self._latest: dict[str, Metric] = {}
        self._lengths = _Values()
        self._truncated = 0
        self._synced: tuple[Counted, int] | None = None

    def updated(self, model: Counted, name: str, result: Update, learning_rate: Metric) -> None:
        """Record an `optimizer_step` of ``model``, called ``name``, which had ``learning_rate``."""
        if not (result.applied or result.skipped):
            return
        prefix = self._prefix(model, name)
        updates = self._updates.setdefault(prefix, _Updates())
        if result.applied and result.loss is not None:
            updates.losses.add(result.loss)
        if result.denominator is not None:
            updates.items = (updates.items or 0.0) + result.denominator
        if result.applied and result.grad_norm is not None:
            updates.norms.add(result.grad_norm)
            updates.clipped += bool(self._max_norm and result.grad_norm > self._max_norm)
        updates.skipped += result.skipped
        self._latest[f"{prefix}/learning_rate"] = learning_rate
        self._latest[f"{prefix}/updates"] = model.updates

    def synced(self, model: Counted | None, weight_version: int) -> None:
        """Record that the engine has the weights of ``model``, None for one that does not train."""
        self._synced = None if model is None else (model, model.updates)
        self._latest["rollout/weight_version"] = weight_version

    def generated(self, lengths: Iterable[int], truncated: int) -> None:
        """Record completions of ``lengths`` tokens, of which ``truncated`` ended at the limit."""
        for length in lengths:
            self._lengths.add(length)
        self._truncated += truncated
        if self._synced is not None:
            model, updates = self._synced
            self._latest["rollout/staleness"] = max(0, model.updates - updates)

    def take(self) -> dict[str, Metric]:
        """Return the metrics since the last `take`, by name."""
        seconds, window = self.phases.take()
        metrics: dict[str, Metric] = {}
        for prefix, updates in self._updates.items():
            metrics |= _of_updates(prefix, updates, window)
        metrics |= self._latest
        if self._lengths.count:
            metrics |= {
                "rollout/completions": self._lengths.count,
                "rollout/completion_tokens/mean": self._lengths.mean,
                "rollout/completion_tokens/min": self._lengths.least,
                "rollout/completion_tokens/max": self._lengths.most,
                "rollout/truncated_fraction": self._truncated / self._lengths.count,
            }
        self._updates, self._lengths, self._truncated = {}, _Values(), 0
        metrics |= {f"seconds/{phase}": value for phase, value in seconds.items()}
        return metrics | {"seconds/total": window} | self._memory()

    def _memory(self) -> dict[str, Metric]:
        report = measure(self._device)
        metrics: dict[str, Metric] = {"memory/host": report.host, "memory/host_peak": report.host_peak}
        if self._device.type == "cuda":
            metrics |= {
                "memory/device": report.device,
                "memory/device_reserved": report.device_reserved,
                "memory/device_used": report.device_used,
            }
        return metrics

    def _prefix(self, model: Counted, name: str) -> str:
        """Return ``name``; with a number, if another model has this name."""
        if model not in self._names:
            taken = set(self._names.values())
            numbered = (f"{name}_{number}" for number in range(2, len(taken) + 3))
            self._names[model] = name if name not in taken else next(other for other in numbered if other not in taken)
        return self._names[model]


def _of_updates(prefix: str, updates: _Updates, window: float) -> dict[str, Metric]:
    metrics: dict[str, Metric] = {f"{prefix}/skipped": updates.skipped}
    if updates.losses.count:
        metrics[f"{prefix}/loss"] = updates.losses.mean
    if updates.norms.count:
        metrics[f"{prefix}/grad_norm"] = updates.norms.mean
        metrics[f"{prefix}/clipped_fraction"] = updates.clipped / updates.norms.count
    if updates.items is not None and window > 0:
        metrics[f"{prefix}/tokens_per_second"] = updates.items / window
    return metrics
