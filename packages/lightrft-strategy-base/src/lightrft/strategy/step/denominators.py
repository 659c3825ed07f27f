"""The denominators of one update: the numbers of items, such as tokens, that its losses are sums over.

The update uses the sum of all losses divided by the sum of all denominators, over micro-batches and ranks. A mean of means
would give a token of a short micro-batch more weight than one of a long micro-batch.

Values on the device stay there. One vector has the sums of denominators and losses, and the numbers of losses with a
denominator, without one, and with an invalid one. One collective sums it over all ranks while the gradient is reduced, and
the host reads it together with the gradient norm. With several ranks, every update makes this collective, even without
denominators: otherwise, a rank that is the only one to pass them, or to leave them out, would block the others.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Self

import torch
import torch.distributed as dist

from lightrft.config import ArgumentError, LightRFTError, StrategyError
from lightrft.config.validation import shown
from lightrft.strategy.arguments import Expected, refusal
from lightrft.strategy.distributed.world import World

ROUNDING = 1e-11
"""Relative to the sum of the denominators, which are fp64."""
Denominator = float | torch.Tensor | None
"""As stored until the update: a number, a 0-d fp64 tensor on an accelerator, or None for a loss without a denominator."""


class NotANumber(float):
    """A denominator of another type, as NaN: one of several ranks must not raise alone, so `optimizer_step` raises on all."""

    shown: str
    """What was passed, for messages."""

    def __new__(cls, denominator: object) -> Self:
        number = super().__new__(cls, math.nan)
        number.shown = shown(denominator)
        return number


_EXPECTED = Expected("a number, a tensor of one number, or None", (Real, torch.Tensor), (bool,))


def validated(denominator: object, device: torch.device) -> Denominator:
    """Return the argument ``denominator`` of `backward` in the form in which it is stored. Does not wait for ``device``.

    Raises:
        ArgumentError, ArgumentTypeError: It is not a number. Its value is checked later, see `invalid_update_error`.
    """
    if denominator is None:
        return None
    if isinstance(denominator, torch.Tensor):
        if (
            denominator.numel() != 1
            or denominator.is_complex()
            or denominator.dtype is torch.bool
            or denominator.is_meta
        ):
            raise refusal("backward", "denominator", denominator, _EXPECTED, "Pass the number of tokens in the loss")
        if denominator.device.type != "cpu":
            return denominator.detach().reshape(()).to(device, torch.float64, copy=True)
        return float(denominator.detach())
    if isinstance(denominator, bool) or not isinstance(denominator, Real):
        raise refusal("backward", "denominator", denominator, _EXPECTED, "Pass the number of tokens in the loss")
    try:
        return float(denominator)
    except OverflowError:  # an integer above 1.8e308
        return math.inf


@dataclass(frozen=True, kw_only=True)
class Totals:
    """The denominators of one update, over micro-batches and ranks."""

    items: float
    """The sum of the denominators."""
    with_denominator: int
    """Losses with a denominator."""
    without_denominator: int
    """Losses without one."""
    invalid: int
    """Losses whose denominator is negative or not finite, and ranks that made another mistake."""
    differ: bool = False
    """Whether ranks that share sequences passed different denominators."""

    @property
    def denominator(self) -> float | None:
        """The sum of the denominators; None for an update without them."""
        return self.items if self.with_denominator else None

    @property
    def update_is_invalid(self) -> bool:
        """Whether no update can be made from them."""
        return self.invalid > 0 or (self.with_denominator > 0 and self.without_denominator > 0) or self.differ

    def factor(self, ranks: int, without: float) -> float:
        """Return what to multiply the mean of the gradients over ``ranks`` ranks by; NaN if there is nothing to update from.

        Args:
            ranks: The number of ranks; ranks that share sequences count as one. Multiplied by the mean, it gives the sum.
            without: The factor of an update without denominators.
        """
        if not self.with_denominator and not self.update_is_invalid:
            return without
        return math.nan if self.update_is_invalid or self.items == 0 else ranks / self.items

    def mean_of(self, losses: float, without: int) -> float | None:
        """Return the loss of the update, from the sum of all losses; None if the denominators add up to 0.

        Args:
            losses: The sum over micro-batches and ranks.
            without: What to divide by in an update without denominators.
        """
        divisor = self.items if self.with_denominator else without
        return losses / divisor if divisor else None


class PendingTotals:
    """The totals of one update while they are summed over the ranks."""

    def __init__(
        self,
        denominators: Sequence[Denominator],
        world: World,
        *,
        sharing: int = 1,
        losses: Sequence[torch.Tensor] = (),
        other_error: bool = False,
    ) -> None:
        """Start the sum. All ranks must call this.

        Args:
            denominators: Those of this rank, one for each `backward` of the update.
            world: All ranks that train together.
            sharing: Ranks that share each sequence: all of them pass its denominator and loss, which count once.
            losses: Those of this rank, 0-d fp64 tensors on its device.
            other_error: Whether this rank made another mistake in the update. It counts as an invalid denominator.
        """
        self._sharing = sharing
        weight = _weight(world.rank, sharing) if world.size > 1 else 0
        self._losses: torch.Tensor | _HostCopy | float = (total := _sum(losses))
        numbers = [value for value in denominators if isinstance(value, float)]
        on_device = [value for value in denominators if isinstance(value, torch.Tensor)]
        with_denominator = len(numbers) + len(on_device)
        self._values = [
            sum(numbers),
            with_denominator,
            len(denominators) - with_denominator,
            sum(map(_is_invalid, numbers), int(other_error)),
            weight * sum(numbers),
            0.0,
        ]
        self._vector: torch.Tensor | None = None
        self._work: dist.Work | None = None
        if world.size > 1 or on_device:
            self._vector = _without_waiting(self._values, world.device)
            self._vector[5] += total
            if on_device:
                values = torch.stack(on_device)
                self._vector[0] += values.sum()
                self._vector[3] += (~(values.isfinite() & (values >= 0))).sum()
                self._vector[4] += weight * values.sum()
        if world.size > 1:
            self._work = dist.all_reduce(self._vector, group=world.device_group, async_op=True)

    def read(self) -> Totals:
        """Return the sum, and wait for it if there is one. All ranks get the same."""
        if self._vector is not None:
            return self._totals(self._summed().tolist())
        if isinstance(self._losses, torch.Tensor) and self._losses.device.type == "cuda":
            self._losses = _HostCopy(self._losses)
        return self._totals(self._values)

    def read_with(self, norm: torch.Tensor) -> tuple[Totals, float]:
        """Return the totals, and the value of ``norm``, a 0-d tensor. The host waits for the device once, for both."""
        if self._vector is None and norm.device.type == "cpu":  # nothing to wait for
            self._losses = float(self._losses)
            return self.read(), norm.item()
        if self._vector is None:
            losses = torch.as_tensor(self._losses, dtype=torch.float64)
            number, self._losses = torch.stack([norm.to(losses), losses]).tolist()
            return self.read(), number
        summed = self._summed()
        *values, number = torch.cat([summed, norm.to(summed).reshape(1)]).tolist()
        return self._totals(values), number

    def losses(self) -> float:
        """Return the sum of the losses over micro-batches and ranks. Does not wait once the norm was read."""
        return float(self._losses) / self._sharing

    def _summed(self) -> torch.Tensor:
        assert self._vector is not None
        if self._work is not None:
            self._work.wait()
        return self._vector

    def _totals(self, values: Sequence[float]) -> Totals:
        items, *counts, difference, losses = values
        if self._vector is not None:
            self._losses = losses
        with_denominator, without_denominator, invalid = map(int, counts)
        return Totals(
            items=items / self._sharing,
            with_denominator=with_denominator,
            without_denominator=without_denominator,
            invalid=invalid,
            differ=abs(difference) > ROUNDING * items,
        )


class _HostCopy:
    """A number on its way from a CUDA device to the host. Reading it waits for the copy, not for what was started later."""

    def __init__(self, value: torch.Tensor) -> None:
        self._number = torch.empty((), dtype=value.dtype, pin_memory=True).copy_(value, non_blocking=True)
        self._copied = torch.cuda.current_stream(value.device).record_event()

    def __float__(self) -> float:
        self._copied.synchronize()
        return self._number.item()


def invalidates_update(denominator: Denominator, earlier: Sequence[Denominator]) -> bool:
    """Return whether no update can be made from ``denominator`` after the ``earlier`` ones, as far as the host knows."""
    mixed = bool(earlier) and (denominator is None) != (earlier[0] is None)
    return mixed or (isinstance(denominator, float) and _is_invalid(denominator))


def report(denominators: Sequence[Denominator]) -> list[str]:
    """Describe the denominators of one rank for `invalid_update_error`: the invalid ones, and the counts. Waits for the device."""
    values = [float(value) if isinstance(value, torch.Tensor) else value for value in denominators]
    invalid = [
        f"{value.shown if isinstance(value, NotANumber) else f'{value:g}'} in backward {index}"
        for index, value in enumerate(values, start=1)
        if value is not None and _is_invalid(value)
    ]
    without_denominator = values.count(None)
    total = sum(value for value in values if value is not None)
    return [
        ", ".join(invalid[:3]),
        f"{len(values) - without_denominator} with and {without_denominator} without",
        f"{total:.17g}",
    ]


def invalid_update_error(
    call: str, class_name: str, reports: Sequence[Sequence[str]], *, differ: bool = False
) -> LightRFTError:
    """Return the error of an update that was dropped, from the `report` of each rank.

    ``differ``: whether only the denominators of ranks that share sequences are wrong.
    """
    several = len(reports) > 1
    invalid = "; ".join(f"rank {rank}: {text}" if several else text for rank, (text, *_) in enumerate(reports) if text)
    dropped = f"The update was dropped, and {class_name} and its optimizer are unchanged"
    if invalid:
        return ArgumentError(
            f"{call}: expected each denominator to be one number, finite and not negative, got {invalid} of the update. {dropped}. "
            f"Pass the number of items that the loss is a sum over, 0 if there are none"
        )
    if differ:
        sums = "; ".join(f"rank {rank}: {total}" for rank, (*_, total) in enumerate(reports))
        return StrategyError(
            f"{call}: expected the same denominators on the ranks that share sequences, got different sums in the update: {sums}. {dropped}. "
            f"Pass the number of items of the whole sequences, not that of a slice"
        )
    counts = "; ".join(f"rank {rank}: {text}" if several else text for rank, (_, text, _) in enumerate(reports))
    return StrategyError(
        f"{call}: expected a denominator with every loss of an update, or with none, got {counts}. {dropped}. Pass "
        f"denominator= to each backward, on every rank, 0 for a loss over no items"
    )


def _weight(rank: int, sharing: int) -> float:
    """Return by what ``rank`` multiplies its denominators, so that those of ranks that share sequences add up to 0 if equal.

    The weights have no simple ratios, so that differences within several groups do not cancel.
    """
    first = rank - rank % sharing
    own = [1 + other * (math.sqrt(5) - 1) / 2 % 1 for other in range(first + 1, first + sharing)]
    return own[rank - first] if rank - first < sharing - 1 else -math.fsum(own)


def _sum(losses: Sequence[torch.Tensor]) -> torch.Tensor | float:
    if len(losses) > 1:
        return torch.stack(list(losses)).sum()
    return losses[0] if losses else 0.0


def _is_invalid(value: float) -> bool:
    return not (math.isfinite(value) and value >= 0)


def _without_waiting(values: Sequence[float], device: torch.device) -> torch.Tensor:
    """Return ``values`` on ``device``, in fp64. A copy from pageable memory would wait for the device."""
    vector = torch.tensor(values, dtype=torch.float64, pin_memory=device.type == "cuda")
    return vector.to(device, non_blocking=True)
