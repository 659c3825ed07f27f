"""COLL: collectives."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from hypothesis import strategies as st
from typing_extensions import override

from lightrft.conformance.clause import CONTRACT, Clause, Execution, Operation, Program, Target, is_error, show
from lightrft.conformance.values import Record, materialize

FLOATING = ["float32", "float64", "bfloat16", "float16"]
INTEGERS = ["int64", "int32", "int16", "int8", "uint8"]
OPS = ["mean", "sum", "max"]
SHAPES = st.lists(st.integers(0, 3), max_size=3)
KEYS = st.text("abcxyz_", min_size=1, max_size=3) | st.integers(0, 3)


def tensors(dtypes: Sequence[str]) -> st.SearchStrategy[Record]:
    """Descriptions of tensors."""
    return st.fixed_dictionaries({"tensor": st.sampled_from(dtypes), "shape": SHAPES, "seed": st.integers(0, 99)})


def numbers(floats_only: bool = False) -> st.SearchStrategy[Any]:
    """Descriptions of numbers that differ between ranks."""
    integers = st.integers(-(2**58), 2**58)
    floats = st.floats(-1e6, 1e6).map(lambda value: round(value, 3))
    kinds = floats if floats_only else integers | floats
    return kinds.map(lambda value: {"per_rank": [value, 3 if isinstance(value, int) else 0.25]})


def nested(leaf: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Leaves, or nested dicts of them."""
    branches = lambda inner: st.lists(  # noqa: E731
        st.tuples(KEYS, inner), max_size=3, unique_by=lambda pair: pair[0]
    ).map(lambda pairs: {"dict": [list(pair) for pair in pairs]})
    return st.recursive(leaf, branches, max_leaves=5)


def expected_reduction(values: Sequence[Any], op: str) -> Any:
    """The reduction of ``values``, one per rank, computed in 64 bits."""
    if isinstance(values[0], dict):
        return {key: expected_reduction([value[key] for value in values], op) for key in values[0]}
    if isinstance(values[0], torch.Tensor):
        wide = torch.stack([value.double() if value.is_floating_point() else value.long() for value in values])
        result = wide.amax(0) if op == "max" else wide.sum(0)
        return result / len(values) if op == "mean" else result
    result = max(values) if op == "max" else sum(values)
    return result / len(values) if op == "mean" else result


def expected_gather(values: Sequence[Any]) -> Any:
    """The concatenation of ``values``, one per rank."""
    if isinstance(values[0], dict):
        return {key: expected_gather([value[key] for value in values]) for key in values[0]}
    if isinstance(values[0], torch.Tensor):
        return torch.cat([value.reshape(1) if value.ndim == 0 else value for value in values])
    return torch.tensor(values, dtype=torch.float64 if isinstance(values[0], float) else torch.int64)


def leaves(clause: Clause, value: Any, like: object, where: str) -> Iterator[tuple[str, Any, Any]]:
    """The path of each leaf, the leaf of ``value`` and that of ``like``. Requires both to have the same keys in order."""
    if not isinstance(like, dict):
        yield where, value, like
        return
    matches = isinstance(value, dict) and list(value) == list(like)
    clause.require(matches, f"{where}: expected the keys {list(like)}, got {show(value)}")
    for key in like:
        yield from leaves(clause, value[key], like[key], f"{where}[{key!r}]")


LARGE: Record = {"tensor": "float32", "shape": [70, 4], "seed": 9}


def with_large_tensor(program: Program) -> Program:
    """The same calls with a large tensor in addition to the argument: small values may be sent in another way."""
    operations = tuple(
        {**operation, "data": {"dict": [["argument", operation["data"]], ["large", LARGE]]}}
        for operation in program.operations
    )
    return replace(program, operations=operations)


class Reducing(Clause):
    """What the clauses about the values of all_reduce share."""

    @override
    def check(self, execution: Execution) -> None:
        for index, operation, seen in execution.each("all_reduce"):
            given, op = arguments(execution, operation), operation["op"]
            for rank, observed in enumerate(seen):
                where = f"rank {rank}, {op} (operation {index})"
                results = leaves(self, observed["result"], given[rank], where)
                expected = leaves(self, expected_reduction(given, op), given[rank], where)
                for (leaf, value, passed), (_, wanted, _) in zip(results, expected, strict=True):
                    if isinstance(passed, torch.Tensor):
                        self._check_tensor(value, wanted, passed, leaf)
                    else:
                        self._check_number(value, wanted, leaf)

    def _check_number(self, value: Any, expected: Any, where: str) -> None:
        same_type = type(value) is type(expected)
        self.require(
            same_type, f"{where}: expected type {type(expected).__name__}, got {type(value).__name__} ({value!r})"
        )
        tolerance = 0 if isinstance(expected, int) else 1e-12 * max(1.0, abs(expected))
        self.require(abs(value - expected) <= tolerance, f"{where}: expected {expected!r}, got {value!r}")

    def _check_tensor(self, value: Any, expected: torch.Tensor, given: torch.Tensor, where: str) -> None:
        require_form(self, value, given, where)
        message = f"{where}: expected {show(expected)}, got {show(value)}"
        if not given.is_floating_point():
            self.require(bool((value.long() == expected).all()), message)
        elif given.numel():
            # one rounding to the dtype, and for fp32 the order of the sum
            self.require(torch.equal(value.isnan(), expected.isnan()), message)
            value, expected = value.nan_to_num(), expected.nan_to_num()
            resolution = torch.finfo(given.dtype).eps * (0.51 if given.dtype.itemsize < 4 else 4)
            worst = ((value.double() - expected).abs() - resolution * (expected.abs() + 1)).max().item()
            self.require(worst <= 0, message)


def require_form(clause: Clause, value: object, given: torch.Tensor, where: str) -> None:
    """Require ``value`` to be a tensor with the dtype and shape of ``given``."""
    matches = isinstance(value, torch.Tensor) and value.dtype == given.dtype and value.shape == given.shape
    clause.require(matches, f"{where}: expected {given.dtype}{tuple(given.shape)}, got {show(value)}")


def arguments(execution: Execution, operation: Operation) -> list[Any]:
    """The argument of each rank, in rank order."""
    return [materialize(operation["data"], rank) for rank in range(execution.target.world)]


@CONTRACT.add
class Reduction(Reducing):
    """all_reduce with mean, sum and max equals the reference for every supported dtype. Under sum and max, integers
    stay integers and are exact. A Python number returns a Python number, computed as float64 or int64; the mean of a
    Python int is a float."""

    id = "COLL-1"
    smallest_world = 2

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        every = [["float", {"per_rank": [0.1, 0.7]}], ["int", {"per_rank": [2**53 + 1, 2]}]]
        every += [[dtype, {"tensor": dtype, "shape": [2, 3], "seed": 1}] for dtype in ("float32", "float64")]
        strided = {"tensor": "float32", "shape": [3, 2], "seed": 4, "transposed": True}
        integers = [[dtype, {"tensor": dtype, "shape": [5], "seed": 2}] for dtype in INTEGERS]
        operations = tuple(
            {"do": "all_reduce", "data": {"dict": every + (integers if op != "mean" else [])}, "op": op} for op in OPS
        )
        single = [({"per_rank": [1, 1]}, "mean"), (strided, "mean"), ({"per_rank": [1, 1]}, "max"), (strided, "max")]
        alone = [{"do": "all_reduce", "data": data, "op": op} for data, op in single]
        large = [{"tensor": "int64", "shape": [5], "seed": 2}, {"per_rank": [2**53 + 1, 2]}]
        lost = {"by_rank": [{"tensor": "float32", "shape": [2], "fill": fill} for fill in (1.0, float("nan"))]}
        exact = [{"do": "all_reduce", "data": data, "op": "sum"} for data in (*large, lost)]
        below = [{"tensor": dtype, "shape": [3], "fill": -3} for dtype in ("int64", "int32", "int8", "float32")]
        largest = [{"do": "all_reduce", "data": data, "op": "max"} for data in (*large, *below, lost)]
        program = Program(operations=(*operations, *alone, *exact, *largest))
        return [program, with_large_tensor(program)]

    @override
    def programs(self, target: Target) -> st.SearchStrategy[Program]:
        floats = tensors(["float32", "float64"]) | numbers()
        means = st.builds(lambda data: {"do": "all_reduce", "data": data, "op": "mean"}, nested(floats))
        others = st.builds(
            lambda data, op: {"do": "all_reduce", "data": data, "op": op},
            nested(floats | tensors(INTEGERS)), st.sampled_from(["sum", "max"]),
        )  # fmt: skip
        return st.lists(means | others, min_size=1, max_size=4).map(
            lambda operations: Program(operations=tuple(operations))
        )


@CONTRACT.add
class IntegerMean(Clause):
    """The mean of an integer tensor raises TypeError on every rank."""

    id = "COLL-7"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        nested_one = {"dict": [["x", 1.0], ["y", {"dict": [["z", {"tensor": "int32", "shape": [2], "seed": 1}]]}]]}
        plain = {"tensor": "int64", "shape": [], "seed": 1}
        return [
            Program(
                operations=tuple(
                    {"do": "all_reduce", "data": data, "op": "mean", "may_fail": True} for data in (plain, nested_one)
                )
            )
        ]

    @override
    def check(self, execution: Execution) -> None:
        for index, _, seen in execution.each("all_reduce"):
            for rank, observed in enumerate(seen):
                self.require_error(observed, "TypeError", "mean", where=f"rank {rank}, operation {index}")


@CONTRACT.add
class ArgumentsLeftAlone(Clause):
    """A collective never changes its argument. The result never shares memory with the argument and never carries its
    autograd graph."""

    id = "COLL-2"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        data = {
            "dict": [
                ["x", {"tensor": "float32", "shape": [4], "seed": 1}],
                ["y", {"tensor": "int64", "shape": [2], "seed": 2}],
            ]
        }
        reductions = [{"do": "all_reduce", "data": data, "op": op} for op in ("sum", "max")]
        single = {"tensor": "float64", "shape": [3], "seed": 1, "grad": True}
        mean = {"do": "all_reduce", "data": single, "op": "mean"}
        gathers = [{"do": "all_gather", "data": argument} for argument in (data, single)]
        program = Program(operations=(*reductions, mean, *gathers))
        return [program, with_large_tensor(program)]

    @override
    def programs(self, target: Target) -> st.SearchStrategy[Program]:
        data = nested(tensors(FLOATING) | numbers())
        calls = st.builds(
            lambda d, op: {"do": "all_reduce", "data": d, "op": op}, data, st.sampled_from(OPS)
        ) | st.builds(lambda d: {"do": "all_gather", "data": d}, data)
        return st.lists(calls, min_size=1, max_size=3).map(lambda operations: Program(operations=tuple(operations)))

    @override
    def check(self, execution: Execution) -> None:
        for do in ("all_reduce", "all_gather"):
            for index, _, seen in execution.each(do):
                for rank, observed in enumerate(seen):
                    self.require(
                        observed["argument_unchanged"], f"rank {rank}: {do} (operation {index}) changed its argument"
                    )
                    self.require(
                        not observed["has_graph"],
                        f"rank {rank}: the result of {do} (operation {index}) carries an autograd graph",
                    )
                    self.require(
                        observed["separate_memory"],
                        f"rank {rank}: the result of {do} (operation {index}) shares memory with its argument",
                    )


@CONTRACT.add
class FormKept(Clause):
    """Dicts may be nested. Keys, their order, shapes, dtypes and devices are preserved."""

    id = "COLL-3"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        scalar = {"tensor": "float32", "shape": [], "seed": 1}
        deeper = {"dict": [["b", 1.5], ["a", 2.5]]}
        halves = [[dtype, {"tensor": dtype, "shape": [2], "seed": 3}] for dtype in ("bfloat16", "float16")]
        data = {
            "dict": [
                ["z", scalar],
                [3, {"dict": [["b", 1.5], ["a", {"tensor": "float64", "shape": [0, 2], "seed": 2}], ["0", deeper]]}],
                ["empty", {"dict": []}],
                *halves,
            ]
        }
        program = Program(operations=tuple({"do": "all_reduce", "data": data, "op": op} for op in OPS))
        return [program, with_large_tensor(program)]

    @override
    def programs(self, target: Target) -> st.SearchStrategy[Program]:
        data = nested(tensors(FLOATING) | numbers(floats_only=True))
        return st.builds(
            lambda d, op: Program(operations=({"do": "all_reduce", "data": d, "op": op},)), data, st.sampled_from(OPS)
        )

    @override
    def check(self, execution: Execution) -> None:
        for index, operation, seen in execution.each("all_reduce"):
            given = arguments(execution, operation)
            for rank, observed in enumerate(seen):
                for where, value, passed in leaves(
                    self, observed["result"], given[rank], f"rank {rank}, operation {index}"
                ):
                    if isinstance(passed, torch.Tensor):
                        require_form(self, value, passed, where)
                    else:
                        is_number = isinstance(value, (int, float))
                        self.require(is_number, f"{where}: expected a number, got {show(value)}")


@CONTRACT.add
class Gathering(Clause):
    """all_gather concatenates along dim 0 in rank order. Numbers and 0-dim tensors give a 1-D tensor of length
    world_size. Ranks may differ in the size of dim 0, which may be 0, and in nothing else. World size 1 follows the
    same rules."""

    id = "COLL-4"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        ragged = {"by_rank": [{"tensor": "float32", "shape": [rows, 2], "seed": rows} for rows in (2, 0, 3, 1)]}
        scalar = {"tensor": "bfloat16", "shape": [], "seed": 3}
        flags = {"tensor": "bool", "shape": [3], "seed": 4}
        data = {
            "dict": [
                ["ragged", ragged],
                ["scalar", scalar],
                ["number", {"per_rank": [1.5, 1.0]}],
                ["count", {"per_rank": [2**40, 1]}],
                ["flags", flags],
            ]
        }
        growing = {"by_rank": [{"tensor": "float32", "shape": [rows, 2], "seed": rows} for rows in (1, 3, 0, 2)]}
        alone = [{"per_rank": [3, 1]}, {"tensor": "float32", "shape": [2, 1], "seed": 5}, flags, growing]
        alone += [{"tensor": "float32", "shape": [3, 2], "seed": 6, "transposed": True}]
        alone += [{"tensor": "float32", "shape": [0, 2], "seed": 7}, {"per_rank": [2**53 + 1, 2]}]
        program = Program(operations=tuple({"do": "all_gather", "data": argument} for argument in (data, *alone)))
        return [program, with_large_tensor(program)]

    @override
    def programs(self, target: Target) -> st.SearchStrategy[Program]:
        def ragged(dtype: str, rows: list[int], rest: list[int]) -> Record:
            return {"by_rank": [{"tensor": dtype, "shape": [count, *rest], "seed": count} for count in rows]}

        rows = st.lists(st.integers(0, 4), min_size=target.world, max_size=target.world)
        leaf = st.builds(
            ragged, st.sampled_from(FLOATING + INTEGERS + ["bool"]), rows, st.lists(st.integers(0, 3), max_size=2)
        )
        return nested(leaf | numbers()).map(lambda data: Program(operations=({"do": "all_gather", "data": data},)))

    @override
    def check(self, execution: Execution) -> None:
        for index, operation, seen in execution.each("all_gather"):
            expected = expected_gather(arguments(execution, operation))
            for rank, observed in enumerate(seen):
                for where, value, wanted in leaves(
                    self, observed["result"], expected, f"rank {rank}, operation {index}"
                ):
                    require_form(self, value, wanted, where)
                    self.require(torch.equal(value, wanted), f"{where}: expected {show(wanted)}, got {show(value)}")


BAD_PAIRS: dict[str, list[Any]] = {
    "keys": [{"dict": [["x", 1.0]]}, {"dict": [["y", 1.0]]}],
    "more keys": [{"dict": [["x", 1.0]]}, {"dict": [["x", 1.0], ["y", 1.0]]}],
    "dtypes": [{"tensor": "float32", "shape": [2], "seed": 1}, {"tensor": "float64", "shape": [2], "seed": 1}],
    "shapes": [{"tensor": "float32", "shape": [2, 3], "seed": 1}, {"tensor": "float32", "shape": [2, 4], "seed": 1}],
    "dimensions": [{"tensor": "float32", "shape": [2], "seed": 1}, {"tensor": "float32", "shape": [2, 1], "seed": 1}],
    "kinds": [1.0, {"tensor": "float64", "shape": [], "seed": 1}],
    "nesting": [{"dict": [["x", 1.0]]}, {"dict": [["x", {"dict": [["y", 1.0]]}]]}],
    "strings": [{"dict": [["x", 1.0]]}, {"dict": [["x", {"text": "one"}]]}],
}


@CONTRACT.add
class Mismatches(Clause):
    """Every rank raises if the op is unknown, if keys, dtypes or trailing shapes differ between ranks, or if an integer
    or a sum of integers does not fit in 64 bits. No rank hangs or returns a result. Collectives work normally
    afterwards."""

    id = "COLL-5"
    smallest_world = 2

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        return [self._program(target, call, what, 1) for what in BAD_PAIRS for call in ("all_reduce", "all_gather")] + [
            self._program(target, "all_reduce", "first dim", 1),
            *(self._reducing(*case) for case in ((1.0, "median"), ({"per_rank": [2**70, 1]}, "sum"), (2**62, "sum"))),
        ]

    def _reducing(self, data: object, op: str) -> Program:
        operations = ({"do": "all_reduce", "data": data, "op": op, "may_fail": True}, *LATER_CALLS)
        return Program(operations=operations, settings={"timeout": 15.0}, seconds=40)

    def _program(self, target: Target, call: str, what: str, odd: int) -> Program:
        usual, other = (
            [{"tensor": "float32", "shape": [2], "seed": 1}, {"tensor": "float32", "shape": [3], "seed": 1}]
            if what == "first dim"
            else BAD_PAIRS[what]
        )
        data = {"by_rank": [other if rank == odd else usual for rank in range(target.world)]}
        return Program(
            operations=(
                {"do": call, "data": data, "may_fail": True, **({"op": "sum"} if call == "all_reduce" else {})},
                *LATER_CALLS,
            ),
            settings={"timeout": 15.0},
            seconds=40,
        )

    @override
    def programs(self, target: Target) -> st.SearchStrategy[Program]:
        return st.builds(
            lambda call, what, odd: self._program(target, call, what, odd),
            st.sampled_from(["all_reduce", "all_gather"]), st.sampled_from(sorted(BAD_PAIRS)), st.integers(0, target.world - 1),
        )  # fmt: skip

    @override
    def check(self, execution: Execution) -> None:
        for rank in range(execution.target.world):
            self.require(
                is_error(execution.at(rank, 0)),
                f"rank {rank}: expected an error because the ranks disagree, got {show(execution.at(rank, 0))}",
            )
            for index, operation in enumerate(LATER_CALLS, 1):
                self._check_after(execution.at(rank, index), operation, execution, rank)

    def _check_after(self, seen: Any, operation: Operation, execution: Execution, rank: int) -> None:
        where = f"rank {rank}: {operation['do']} afterwards"
        self.require(not is_error(seen), f"{where} raised {show(seen)}")
        given = arguments(execution, operation)
        wanted = expected_reduction(given, "sum") if operation["do"] == "all_reduce" else expected_gather(given)
        right = torch.equal(seen["result"], wanted.to(seen["result"].dtype))
        self.require(right, f"{where}: expected {show(wanted)}, got {show(seen['result'])}")


LATER_TENSOR: Record = {"tensor": "int64", "shape": [2], "seed": 8}
LATER_CALLS: list[Operation] = [
    {"do": "all_reduce", "data": LATER_TENSOR, "op": "sum", "may_fail": True},
    {"do": "all_gather", "data": LATER_TENSOR, "may_fail": True},
]


@CONTRACT.add
class HalfReduction(Reducing):
    """bf16 and fp16 are reduced in fp32."""

    id = "COLL-6"
    level = "SHOULD"
    smallest_world = 2

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        halves = [[dtype, {"tensor": dtype, "shape": [64], "seed": 1}] for dtype in ("bfloat16", "float16")]
        large = ["large", {"tensor": "float16", "shape": [2], "fill": 40000.0}]  # the sum overflows fp16
        data = {"dict": [*halves, large]}
        return [Program(operations=tuple({"do": "all_reduce", "data": data, "op": op} for op in ("mean", "max")))]
