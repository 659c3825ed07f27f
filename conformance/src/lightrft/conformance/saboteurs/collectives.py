"""Defects of all_reduce and all_gather."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from typing_extensions import override

from lightrft.conformance.saboteurs.catalogue import saboteur
from lightrft.conformance.saboteurs.hooks import CollectiveHooks
from lightrft.conformance.saboteurs.plain import PlainStrategy
from lightrft.strategy import FakeStrategy
from lightrft.strategy.distributed.collectives import ReduceOp

# mypy: disable-error-code="misc"


def map_leaves(function: Callable[[Any], object], data: object) -> object:
    """Return ``data`` with ``function`` of every leaf."""
    if isinstance(data, dict):
        return {key: map_leaves(function, value) for key, value in data.items()}
    return function(data)


@saboteur("COLL-1", world=2)
class MaxIsSum(PlainStrategy):
    """op="max" computes the sum."""

    def all_reduce(self, data: Any, op: ReduceOp = "mean") -> Any:
        return super().all_reduce(data, "sum" if op == "max" else op)


@saboteur("COLL-1", world=2)
class SinglePrecision(PlainStrategy):
    """Python numbers are reduced in fp32."""

    def all_reduce(self, data: Any, op: ReduceOp = "mean") -> Any:
        def leaf(value: Any) -> object:
            if isinstance(value, torch.Tensor):
                return super(SinglePrecision, self).all_reduce(value, op)
            result = super(SinglePrecision, self).all_reduce(torch.tensor(float(value)), op).item()
            return int(result) if isinstance(value, int) and op != "mean" else result

        return map_leaves(leaf, data)


@saboteur("COLL-1", world=2)
class IntegersAsDoubles(PlainStrategy):
    """int64 is summed in float64, which has 53 bits."""

    def all_reduce(self, data: Any, op: ReduceOp = "mean") -> Any:
        if isinstance(data, torch.Tensor) and data.dtype == torch.int64:
            return super().all_reduce(data.double(), op).long()
        return super().all_reduce(data, op)


@saboteur("COLL-1", world=2)
class OrderOfMemory(PlainStrategy):
    """A tensor that is not contiguous comes back in the order of its memory."""

    def all_reduce(self, data: Any, op: ReduceOp = "mean") -> Any:
        if isinstance(data, torch.Tensor) and data.ndim == 2 and not data.is_contiguous():
            return super().all_reduce(data.t().contiguous(), op).reshape(data.shape)
        return super().all_reduce(data, op)


@saboteur("COLL-1", world=2)
class LosesNaN(PlainStrategy):
    """The maximum ignores a NaN of one rank."""

    def all_reduce(self, data: Any, op: ReduceOp = "mean") -> Any:
        if op == "max" and isinstance(data, torch.Tensor) and data.is_floating_point():
            return super().all_reduce(torch.nan_to_num(data, nan=-torch.inf), op)
        return super().all_reduce(data, op)


@saboteur("COLL-2", world=2)
class FalseGraph(CollectiveHooks, PlainStrategy):
    """The result requires a gradient if the argument does, although it has no graph."""

    @override
    def reduced(self, data: object, result: object) -> object:
        if isinstance(data, torch.Tensor) and isinstance(result, torch.Tensor) and data.requires_grad:
            result.requires_grad_()
        return result


@saboteur("COLL-4", world=2)
class SqueezesColumns(CollectiveHooks, PlainStrategy):
    """A gathered single column comes back without its dimension."""

    @override
    def gathered(self, data: object, result: object) -> object:
        if isinstance(result, torch.Tensor) and result.ndim > 1 and result.shape[-1] == 1:
            return result.squeeze(-1)
        return result


@saboteur("COLL-1", world=2)
class IntegerMeans(CollectiveHooks, PlainStrategy):
    """The mean of a Python int is an int."""

    @override
    def reduced(self, data: object, result: object) -> object:
        return int(result) if isinstance(data, int) and isinstance(result, float) else result


@saboteur("COLL-1", world=2)
class LastRankOff(CollectiveHooks, PlainStrategy):
    """On the last rank, floats are 1 too large."""

    @override
    def reduced(self, data: object, result: object) -> object:
        last = self.world.rank == self.world.size - 1
        return map_leaves(lambda leaf: leaf + 1 if last and isinstance(leaf, float) else leaf, result)


@saboteur("COLL-1", world=2)
class LastRankOffWhenLarge(CollectiveHooks, PlainStrategy):
    """On the last rank, numbers reduced together with a large tensor are 1 too large."""

    @override
    def reduced(self, data: object, result: object) -> object:
        sizes: list[int] = []
        map_leaves(lambda leaf: sizes.append(leaf.nbytes if isinstance(leaf, torch.Tensor) else 8), data)
        off = self.world.rank == self.world.size - 1 and sum(sizes) > 1024
        return map_leaves(lambda leaf: leaf + 1 if off and isinstance(leaf, float) else leaf, result)


@saboteur("COLL-7")
class MeansOfIntegers(FakeStrategy):
    """The mean of an integer tensor is rounded down."""

    def all_reduce(self, data: Any, op: ReduceOp = "mean") -> Any:
        if isinstance(data, torch.Tensor) and not data.is_floating_point():
            return super().all_reduce(data, "sum") // self.world_size
        return super().all_reduce(data, op)


@saboteur("COLL-2", world=2)
class InPlace(CollectiveHooks, PlainStrategy):
    """all_reduce writes into its argument."""

    @override
    def reduced(self, data: object, result: object) -> object:
        if isinstance(data, torch.Tensor) and isinstance(result, torch.Tensor):
            data.detach().copy_(result)
        return result


@saboteur("COLL-2")
class SameMemory(CollectiveHooks, FakeStrategy):
    """On one rank, all_reduce returns its argument."""

    @override
    def reduced(self, data: object, result: object) -> object:
        return data


@saboteur("COLL-2")
class GathersViews(CollectiveHooks, FakeStrategy):
    """On one rank, all_gather returns a view of its argument."""

    @override
    def gathered(self, data: object, result: object) -> object:
        if isinstance(data, torch.Tensor) and isinstance(result, torch.Tensor):
            return data.view(result.shape)
        return result


@saboteur("COLL-3")
class SortsKeys(CollectiveHooks, FakeStrategy):
    """Keys come back sorted."""

    @override
    def reduced(self, data: object, result: object) -> object:
        return dict(sorted(result.items(), key=lambda item: str(item[0]))) if isinstance(result, dict) else result


@saboteur("COLL-3")
class Flattens(CollectiveHooks, FakeStrategy):
    """0-dim tensors come back with one dimension."""

    @override
    def reduced(self, data: object, result: object) -> object:
        return map_leaves(
            lambda leaf: leaf.reshape(1) if isinstance(leaf, torch.Tensor) and not leaf.ndim else leaf, result
        )


@saboteur("COLL-3")
class WidensHalves(CollectiveHooks, FakeStrategy):
    """bf16 and fp16 come back as fp32."""

    @override
    def reduced(self, data: object, result: object) -> object:
        def leaf(value: object) -> object:
            if isinstance(value, torch.Tensor) and value.dtype in (torch.bfloat16, torch.float16):
                return value.float()
            return value

        return map_leaves(leaf, result)


@saboteur("COLL-4", world=2)
class WrongOrder(PlainStrategy):
    """all_gather concatenates the ranks in reverse order."""

    def all_gather(self, data: Any) -> Any:
        if not isinstance(data, (int, float)):
            return super().all_gather(data)
        return super().all_gather(data).flip(0)


@saboteur("COLL-4", world=2)
class EvenRows(PlainStrategy):
    """all_gather cuts every rank to the smallest number of rows."""

    def all_gather(self, data: Any) -> Any:
        def leaf(value: Any) -> object:
            if not isinstance(value, torch.Tensor) or value.ndim == 0:
                return super(EvenRows, self).all_gather(value)
            fewest = -int(super(EvenRows, self).all_reduce(-value.shape[0], "max"))
            return super(EvenRows, self).all_gather(value[:fewest])

        return map_leaves(leaf, data)


@saboteur("COLL-4")
class BareScalars(CollectiveHooks, FakeStrategy):
    """On one rank, all_gather of a number returns a 0-dim tensor."""

    @override
    def gathered(self, data: object, result: object) -> object:
        return result[0] if isinstance(data, (int, float)) and isinstance(result, torch.Tensor) else result


@saboteur("COLL-5", world=2)
class AnyOp(PlainStrategy):
    """An unknown op computes the sum."""

    def all_reduce(self, data: Any, op: ReduceOp = "mean") -> Any:
        return super().all_reduce(data, op if op in ("mean", "sum", "max") else "sum")


@saboteur("COLL-5", world=2)
class FewestKeys(PlainStrategy):
    """Keys that not all ranks pass are dropped, without an error."""

    def all_reduce(self, data: Any, op: ReduceOp = "mean") -> Any:
        if not isinstance(data, dict):
            return super().all_reduce(data, op)
        keys: list[list[str]] = [[]] * self.world.size
        dist.all_gather_object(keys, sorted(map(str, data)))
        common = set(keys[0]).intersection(*keys[1:])
        return super().all_reduce({key: value for key, value in data.items() if str(key) in common}, op)


@saboteur("COLL-5", world=2)
class OneRankReturns(PlainStrategy):
    """If the ranks pass different structures, rank 0 returns its argument."""

    def all_gather(self, data: Any) -> Any:
        try:
            return super().all_gather(data)
        except RuntimeError:
            if self.world.rank == 0:
                return data
            raise


@saboteur("COLL-6", world=2)
class HalfSums(PlainStrategy):
    """fp16 is reduced in fp16."""

    def all_reduce(self, data: Any, op: ReduceOp = "mean") -> Any:
        def leaf(value: Any) -> object:
            if not isinstance(value, torch.Tensor) or value.dtype != torch.float16 or op == "max":
                return super(HalfSums, self).all_reduce(value, op)
            parts = super(HalfSums, self).all_gather(value.reshape(1, -1))
            total = sum(parts[1:], start=parts[0])
            return (total / self.world.size if op == "mean" else total).reshape(value.shape)

        return map_leaves(leaf, data)


@saboteur("COLL-1", world=2)
class MaxOfAnIntIsAFloat(PlainStrategy):
    """The maximum of a single Python int is a float."""

    def all_reduce(self, data: Any, op: ReduceOp = "mean") -> Any:
        result = super().all_reduce(data, op)
        return float(result) if op == "max" and isinstance(data, int) else result


@saboteur("COLL-3")
class SortedInside(CollectiveHooks, FakeStrategy):
    """Keys of dicts come back sorted from the third level of nesting on."""

    @override
    def reduced(self, data: object, result: object) -> object:
        return self._sorted(result, 0)

    def _sorted(self, data: object, depth: int) -> object:
        if not isinstance(data, dict):
            return data
        return {key: self._sorted(data[key], depth + 1) for key in (sorted(data) if depth > 1 else data)}


@saboteur("COLL-4")
class GathersMemory(FakeStrategy):
    """all_gather reads a strided tensor as if it were contiguous."""

    def all_gather(self, data: Any) -> Any:
        if isinstance(data, torch.Tensor) and not data.is_contiguous():
            data = torch.as_strided(data, data.shape, torch.empty(data.shape).stride())
        return super().all_gather(data)


@saboteur("COLL-4")
class NoRowsNoColumns(CollectiveHooks, FakeStrategy):
    """all_gather of 0 rows loses the other dimensions."""

    @override
    def gathered(self, data: object, result: object) -> object:
        return result.reshape(-1) if isinstance(result, torch.Tensor) and not result.numel() else result


@saboteur("COLL-4", world=2)
class LargestFirst(CollectiveHooks, PlainStrategy):
    """all_gather puts the rank with the most rows first."""

    @override
    def gathered(self, data: object, result: object) -> object:
        if not isinstance(data, torch.Tensor) or not isinstance(result, torch.Tensor) or not data.ndim:
            return result
        first, second = super().all_gather(data.shape[0]).tolist()
        return torch.cat([result[first:], result[:first]]) if second > first else result


@saboteur("COLL-5", world=2)
class AloneAfterAnError(PlainStrategy):
    """After an error, all_reduce returns its argument."""

    _alone = False

    def all_reduce(self, data: Any, op: ReduceOp = "mean") -> Any:
        if self._alone:
            return data.clone()
        try:
            return super().all_reduce(data, op)
        except Exception:
            self._alone = True
            raise


@saboteur("COLL-1", world=2)
class LargestIsNotNegative(CollectiveHooks, PlainStrategy):
    """The maximum of integers starts at 0."""

    def all_reduce(self, data: object, op: ReduceOp = "mean") -> Any:
        result = super().all_reduce(data, op)
        integer = isinstance(result, torch.Tensor) and not result.is_floating_point()
        return result.clamp(min=0) if op == "max" and integer else result


@saboteur("COLL-1", world=2)
class LargestIntAsDouble(PlainStrategy):
    """The maximum of Python ints is computed in float64, which has 53 bits."""

    def all_reduce(self, data: Any, op: ReduceOp = "mean") -> Any:
        return (
            int(super().all_reduce(float(data), op))
            if isinstance(data, int) and op == "max"
            else super().all_reduce(data, op)
        )


@saboteur("COLL-4", world=2)
class GathersIntsAsDoubles(PlainStrategy):
    """Python ints are gathered in float64, which has 53 bits."""

    def all_gather(self, data: object) -> Any:
        return map_leaves(
            lambda leaf: (
                super(GathersIntsAsDoubles, self).all_gather(float(leaf)).long()
                if isinstance(leaf, int)
                else super(GathersIntsAsDoubles, self).all_gather(leaf)
            ),
            data,
        )
