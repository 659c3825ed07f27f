"""Defects of all_reduce and all_gather."""

from typing import Any

import torch
import torch.distributed as dist

from lightrft.conformance.saboteurs.catalogue import saboteur
from lightrft.conformance.saboteurs.plain import PlainStrategy
from lightrft.strategy import FakeStrategy

# mypy: disable-error-code="misc"


def everywhere(function: Any, data: Any) -> Any:
    """``function`` of every leaf."""
    if isinstance(data, dict):
        return {key: everywhere(function, value) for key, value in data.items()}
    return function(data)


@saboteur("COLL-1", world=2)
class MaxIsSum(PlainStrategy):
    """The maximum is the sum."""

    def all_reduce(self, data: Any, op: Any = "mean") -> Any:
        return super().all_reduce(data, "sum" if op == "max" else op)


@saboteur("COLL-1", world=2)
class SinglePrecision(PlainStrategy):
    """Python numbers are computed in fp32."""

    def all_reduce(self, data: Any, op: Any = "mean") -> Any:
        def leaf(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                return super(SinglePrecision, self).all_reduce(value, op)
            result = super(SinglePrecision, self).all_reduce(torch.tensor(float(value)), op).item()
            return int(result) if isinstance(value, int) and op != "mean" else result

        return everywhere(leaf, data)


@saboteur("COLL-1", world=2)
class WholeNumbersAsDoubles(PlainStrategy):
    """int64 is summed as float64, which holds no more than 53 bits."""

    def all_reduce(self, data: Any, op: Any = "mean") -> Any:
        if isinstance(data, torch.Tensor) and data.dtype == torch.int64:
            return super().all_reduce(data.double(), op).long()
        return super().all_reduce(data, op)


@saboteur("COLL-1", world=2)
class OrderOfMemory(PlainStrategy):
    """A tensor that does not lie in memory row by row comes back in the order in which it lies."""

    def all_reduce(self, data: Any, op: Any = "mean") -> Any:
        if isinstance(data, torch.Tensor) and data.ndim == 2 and not data.is_contiguous():
            return super().all_reduce(data.t().contiguous(), op).reshape(data.shape)
        return super().all_reduce(data, op)


@saboteur("COLL-1", world=2)
class LosesNaN(PlainStrategy):
    """The maximum passes over a NaN of one rank."""

    def all_reduce(self, data: Any, op: Any = "mean") -> Any:
        if op == "max" and isinstance(data, torch.Tensor) and data.is_floating_point():
            return super().all_reduce(torch.nan_to_num(data, nan=-torch.inf), op)
        return super().all_reduce(data, op)


@saboteur("COLL-2", world=2)
class FalseGraph(PlainStrategy):
    """The result requires a gradient where the argument did, although nothing would flow back."""

    def all_reduce(self, data: Any, op: Any = "mean") -> Any:
        result = super().all_reduce(data, op)
        return result.requires_grad_() if isinstance(data, torch.Tensor) and data.requires_grad else result


@saboteur("COLL-4", world=2)
class SqueezesColumns(PlainStrategy):
    """A single column that is gathered comes back without its dimension."""

    def all_gather(self, data: Any) -> Any:
        found = super().all_gather(data)
        single = isinstance(found, torch.Tensor) and found.ndim > 1 and found.shape[-1] == 1
        return found.squeeze(-1) if single else found


@saboteur("COLL-1", world=2)
class WholeMeans(PlainStrategy):
    """The mean of a Python int is an int."""

    def all_reduce(self, data: Any, op: Any = "mean") -> Any:
        result = super().all_reduce(data, op)
        return int(result) if isinstance(data, int) else result


@saboteur("COLL-1", world=2)
class LastRankOff(PlainStrategy):
    """On the last rank alone, sums are a little off."""

    def all_reduce(self, data: Any, op: Any = "mean") -> Any:
        result = super().all_reduce(data, op)
        last = self.world.rank == self.world.size - 1
        return everywhere(lambda it: it + 1 if last and isinstance(it, float) else it, result)


@saboteur("COLL-7")
class MeansOfIntegers(FakeStrategy):
    """The mean of an integer tensor is rounded down."""

    def all_reduce(self, data: Any, op: Any = "mean") -> Any:
        if isinstance(data, torch.Tensor) and not data.is_floating_point():
            return super().all_reduce(data, "sum") // self.world_size
        return super().all_reduce(data, op)


@saboteur("COLL-2", world=2)
class InPlace(PlainStrategy):
    """all_reduce writes into its argument."""

    def all_reduce(self, data: Any, op: Any = "mean") -> Any:
        result = super().all_reduce(data, op)
        if isinstance(data, torch.Tensor):
            data.copy_(result)
        return result


@saboteur("COLL-2")
class SameMemory(FakeStrategy):
    """On one rank all_reduce returns its argument."""

    def all_reduce(self, data: Any, op: Any = "mean") -> Any:
        super().all_reduce(data, op)
        return data


@saboteur("COLL-2")
class GathersViews(FakeStrategy):
    """On one rank all_gather returns a view of its argument."""

    def all_gather(self, data: Any) -> Any:
        result = super().all_gather(data)
        return data.view(result.shape) if isinstance(data, torch.Tensor) else result


@saboteur("COLL-3")
class SortsKeys(FakeStrategy):
    """Keys come back in another order."""

    def all_reduce(self, data: Any, op: Any = "mean") -> Any:
        result = super().all_reduce(data, op)
        return dict(sorted(result.items(), key=lambda it: str(it[0]))) if isinstance(result, dict) else result


@saboteur("COLL-3")
class Flattens(FakeStrategy):
    """0-dim tensors come back with one dimension."""

    def all_reduce(self, data: Any, op: Any = "mean") -> Any:
        result = super().all_reduce(data, op)
        return everywhere(lambda it: it.reshape(1) if isinstance(it, torch.Tensor) and it.ndim == 0 else it, result)


@saboteur("COLL-3")
class WidensHalves(FakeStrategy):
    """Half precision comes back as fp32."""

    def all_reduce(self, data: Any, op: Any = "mean") -> Any:
        half = (torch.bfloat16, torch.float16)
        result = super().all_reduce(data, op)
        return everywhere(lambda it: it.float() if isinstance(it, torch.Tensor) and it.dtype in half else it, result)


@saboteur("COLL-4", world=2)
class WrongOrder(PlainStrategy):
    """all_gather concatenates the last rank first."""

    def all_gather(self, data: Any) -> Any:
        if not isinstance(data, (int, float)):
            return super().all_gather(data)
        return super().all_gather(data).flip(0)


@saboteur("COLL-4", world=2)
class EvenRows(PlainStrategy):
    """all_gather cuts every rank to the fewest rows."""

    def all_gather(self, data: Any) -> Any:
        def leaf(value: Any) -> Any:
            if not isinstance(value, torch.Tensor) or value.ndim == 0:
                return super(EvenRows, self).all_gather(value)
            fewest = -int(super(EvenRows, self).all_reduce(-value.shape[0], "max"))
            return super(EvenRows, self).all_gather(value[:fewest])

        return everywhere(leaf, data)


@saboteur("COLL-4")
class BareScalars(FakeStrategy):
    """On one rank a number comes back as a 0-dim tensor."""

    def all_gather(self, data: Any) -> Any:
        result = super().all_gather(data)
        return result[0] if isinstance(data, (int, float)) else result


@saboteur("COLL-5", world=2)
class AnyOp(PlainStrategy):
    """An unknown op is taken for the sum."""

    def all_reduce(self, data: Any, op: Any = "mean") -> Any:
        return super().all_reduce(data, op if op in ("mean", "sum", "max") else "sum")


@saboteur("COLL-5", world=2)
class FewestKeys(PlainStrategy):
    """Only the keys that all ranks have are reduced, without a word."""

    def all_reduce(self, data: Any, op: Any = "mean") -> Any:
        if not isinstance(data, dict):
            return super().all_reduce(data, op)
        keys: list[Any] = [None] * self.world.size
        dist.all_gather_object(keys, sorted(map(str, data)))
        common = set(keys[0]).intersection(*keys[1:])
        return super().all_reduce({key: value for key, value in data.items() if str(key) in common}, op)


@saboteur("COLL-5", world=2)
class OneRankReturns(PlainStrategy):
    """Where the ranks do not agree, rank 0 returns its own argument."""

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

    def all_reduce(self, data: Any, op: Any = "mean") -> Any:
        def leaf(value: Any) -> Any:
            if not isinstance(value, torch.Tensor) or value.dtype != torch.float16 or op == "max":
                return super(HalfSums, self).all_reduce(value, op)
            parts = super(HalfSums, self).all_gather(value.reshape(1, -1))
            total = sum(parts[1:], start=parts[0])
            return (total / self.world.size if op == "mean" else total).reshape(value.shape)

        return everywhere(leaf, data)
