"""COLL: collectives."""

from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from typing_extensions import override

from lightrft.conformance.clause import CONTRACT, Clause, Operation, Place, Program, Trial, is_error, show
from lightrft.conformance.values import materialize

FLOATING = ["float32", "float64", "bfloat16", "float16"]
INTEGERS = ["int64", "int32", "int16", "int8", "uint8"]
OPS = ["mean", "sum", "max"]
SHAPES = st.lists(st.integers(0, 3), max_size=3)
KEYS = st.text("abcxyz_", min_size=1, max_size=3) | st.integers(0, 3)


def tensors(dtypes: Sequence[str]) -> st.SearchStrategy[dict[str, Any]]:
    """Descriptions of tensors."""
    return st.fixed_dictionaries({"tensor": st.sampled_from(dtypes), "shape": SHAPES, "seed": st.integers(0, 99)})


def numbers(floats_only: bool = False) -> st.SearchStrategy[Any]:
    """Numbers that differ between ranks."""
    whole = st.integers(-(2**58), 2**58)
    wide = st.floats(-1e6, 1e6).map(lambda value: round(value, 3))
    kinds = wide if floats_only else whole | wide
    return kinds.map(lambda value: {"per_rank": [value, 3 if isinstance(value, int) else 0.25]})


def nested(leaf: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Leaves, or dicts of them, to some depth."""
    branches = lambda inner: st.lists(  # noqa: E731
        st.tuples(KEYS, inner), max_size=3, unique_by=lambda pair: pair[0]
    ).map(lambda pairs: {"dict": [list(pair) for pair in pairs]})
    return st.recursive(leaf, branches, max_leaves=5)


def expected_reduction(values: Sequence[Any], op: str) -> Any:
    """What reducing ``values``, one a rank, gives; computed in 64 bits."""
    if isinstance(values[0], dict):
        return {key: expected_reduction([value[key] for value in values], op) for key in values[0]}
    if isinstance(values[0], torch.Tensor):
        wide = torch.stack([value.double() if value.is_floating_point() else value.long() for value in values])
        result = wide.amax(0) if op == "max" else wide.sum(0)
        return result / len(values) if op == "mean" else result
    result = max(values) if op == "max" else sum(values)
    return result / len(values) if op == "mean" else result


def expected_gather(values: Sequence[Any]) -> Any:
    """What gathering ``values``, one a rank, gives."""
    if isinstance(values[0], dict):
        return {key: expected_gather([value[key] for value in values]) for key in values[0]}
    if isinstance(values[0], torch.Tensor):
        return torch.cat([value.reshape(1) if value.ndim == 0 else value for value in values])
    return torch.tensor(values, dtype=torch.float64 if isinstance(values[0], float) else torch.int64)


class Reducing(Clause):
    """What the clauses of all_reduce have in common."""

    def compare(self, found: Any, expected: Any, given: Any, where: str) -> None:
        """Require ``found`` to be ``expected``, in the form of ``given``."""
        if isinstance(given, dict):
            self.require(
                isinstance(found, dict) and list(found) == list(given),
                f"{where}: keys {show(found)}, wanted {list(given)}",
            )
            for key in given:
                self.compare(found[key], expected[key], given[key], f"{where}[{key!r}]")
        elif isinstance(given, torch.Tensor):
            self._compare_tensor(found, expected, given, where)
        else:
            self.require(
                type(found) is type(expected),
                f"{where}: {found!r} is a {type(found).__name__}, wanted a {type(expected).__name__}",
            )
            close = (
                found == expected
                if isinstance(expected, int)
                else abs(found - expected) <= 1e-12 * max(1.0, abs(expected))
            )
            self.require(close, f"{where}: {found!r}, wanted {expected!r}")

    def _compare_tensor(self, found: Any, expected: torch.Tensor, given: torch.Tensor, where: str) -> None:
        self.require(isinstance(found, torch.Tensor), f"{where}: {show(found)} is no tensor")
        self.require(found.dtype == given.dtype, f"{where}: dtype {found.dtype}, wanted {given.dtype}")
        self.require(found.shape == given.shape, f"{where}: shape {tuple(found.shape)}, wanted {tuple(given.shape)}")
        if not given.is_floating_point():
            self.require(
                bool((found.long() == expected).all()), f"{where}: {show(found)}, wanted exactly {show(expected)}"
            )
        elif given.numel():
            # one rounding to the dtype, and for fp32 the order of the sum
            self.require(
                torch.equal(found.isnan(), expected.isnan()), f"{where}: {show(found)}, wanted {show(expected)}"
            )
            found, expected = found.nan_to_num(), expected.nan_to_num()
            resolution = torch.finfo(given.dtype).eps * (0.51 if given.dtype.itemsize < 4 else 4)
            worst = ((found.double() - expected).abs() - resolution * (expected.abs() + 1)).max().item()
            self.require(worst <= 0, f"{where}: {show(found)}, wanted {show(expected)}")


def arguments(trial: Trial, operation: dict[str, Any]) -> list[Any]:
    """What each rank passed."""
    return [materialize(operation["data"], rank) for rank in range(trial.place.world)]


@CONTRACT.add
class Reduction(Reducing):
    """all_reduce with mean, sum, max equals the reference for every supported dtype. Integers stay integers and exact
    under sum and max. A Python number in gives a Python number out, computed as float64 or int64; the mean of a Python
    int is a float."""

    id = "COLL-1"
    smallest_world = 2

    @override
    def witnesses(self, place: Place) -> Sequence[Program]:
        every = [["float", {"per_rank": [0.1, 0.7]}], ["int", {"per_rank": [2**53 + 1, 2]}]]
        every += [[dtype, {"tensor": dtype, "shape": [2, 3], "seed": 1}] for dtype in ("float32", "float64")]
        strided = {"tensor": "float32", "shape": [3, 2], "seed": 4, "transposed": True}
        whole = [[dtype, {"tensor": dtype, "shape": [5], "seed": 2}] for dtype in INTEGERS]
        operations = tuple(
            {"do": "all_reduce", "data": {"dict": every + (whole if op != "mean" else [])}, "op": op} for op in OPS
        )
        single = [({"per_rank": [1, 1]}, "mean"), (strided, "mean"), ({"per_rank": [1, 1]}, "max"), (strided, "max")]
        alone = [{"do": "all_reduce", "data": data, "op": op} for data, op in single]
        large = [{"tensor": "int64", "shape": [5], "seed": 2}, {"per_rank": [2**53 + 1, 2]}]
        lost = {"by_rank": [{"tensor": "float32", "shape": [2], "fill": fill} for fill in (1.0, float("nan"))]}
        exact = [{"do": "all_reduce", "data": data, "op": "sum"} for data in (*large, lost)]
        return [Program(operations=(*operations, *alone, *exact, {"do": "all_reduce", "data": lost, "op": "max"}))]

    @override
    def programs(self, place: Place) -> st.SearchStrategy[Program]:
        floats = tensors(["float32", "float64"]) | numbers()
        means = st.builds(lambda data: {"do": "all_reduce", "data": data, "op": "mean"}, nested(floats))
        others = st.builds(
            lambda data, op: {"do": "all_reduce", "data": data, "op": op},
            nested(floats | tensors(INTEGERS)), st.sampled_from(["sum", "max"]),
        )  # fmt: skip
        return st.lists(means | others, min_size=1, max_size=4).map(lambda found: Program(operations=tuple(found)))

    @override
    def check(self, trial: Trial) -> None:
        for index, operation, seen in trial.each("all_reduce"):
            given, op = arguments(trial, operation), operation.get("op", "mean")
            for rank, observed in enumerate(seen):
                self.compare(
                    observed["result"],
                    expected_reduction(given, op),
                    given[rank],
                    f"rank {rank}, {op} (operation {index})",
                )


@CONTRACT.add
class IntegerMean(Clause):
    """The mean of an integer tensor raises TypeError, on every rank."""

    id = "COLL-7"

    @override
    def witnesses(self, place: Place) -> Sequence[Program]:
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
    def check(self, trial: Trial) -> None:
        for index, _, seen in trial.each("all_reduce"):
            for rank, observed in enumerate(seen):
                self.require_error(observed, "TypeError", "mean", where=f"rank {rank}, operation {index}")


@CONTRACT.add
class ArgumentsLeftAlone(Clause):
    """The argument of a collective is never changed, and the result never shares memory with it, nor carries its graph."""

    id = "COLL-2"

    @override
    def witnesses(self, place: Place) -> Sequence[Program]:
        data = {
            "dict": [
                ["x", {"tensor": "float32", "shape": [4], "seed": 1}],
                ["y", {"tensor": "int64", "shape": [2], "seed": 2}],
            ]
        }
        reductions = [{"do": "all_reduce", "data": data, "op": op} for op in ("sum", "max")]
        single = {"tensor": "float64", "shape": [3], "seed": 1, "grad": True}
        mean = {"do": "all_reduce", "data": single, "op": "mean"}
        return [
            Program(
                operations=(*reductions, mean, {"do": "all_gather", "data": data}, {"do": "all_gather", "data": single})
            )
        ]

    @override
    def programs(self, place: Place) -> st.SearchStrategy[Program]:
        data = nested(tensors(FLOATING) | numbers())
        calls = st.builds(
            lambda d, op: {"do": "all_reduce", "data": d, "op": op}, data, st.sampled_from(OPS)
        ) | st.builds(lambda d: {"do": "all_gather", "data": d}, data)
        return st.lists(calls, min_size=1, max_size=3).map(lambda found: Program(operations=tuple(found)))

    @override
    def check(self, trial: Trial) -> None:
        for do in ("all_reduce", "all_gather"):
            for index, _, seen in trial.each(do):
                for rank, observed in enumerate(seen):
                    self.require(observed["untouched"], f"rank {rank}: {do} (operation {index}) changed its argument")
                    self.require(
                        not observed["graph"], f"rank {rank}: the result of {do} (operation {index}) has a graph"
                    )
                    self.require(
                        observed["apart"],
                        f"rank {rank}: the result of {do} (operation {index}) shares memory with its argument",
                    )


@CONTRACT.add
class FormKept(Reducing):
    """Dicts may nest; keys, their order, shapes, dtypes and devices come back as they went in."""

    id = "COLL-3"

    @override
    def witnesses(self, place: Place) -> Sequence[Program]:
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
        return [Program(operations=tuple({"do": "all_reduce", "data": data, "op": op} for op in OPS))]

    @override
    def programs(self, place: Place) -> st.SearchStrategy[Program]:
        data = nested(tensors(FLOATING) | numbers(floats_only=True))
        return st.builds(
            lambda d, op: Program(operations=({"do": "all_reduce", "data": d, "op": op},)), data, st.sampled_from(OPS)
        )

    @override
    def check(self, trial: Trial) -> None:
        for index, operation, seen in trial.each("all_reduce"):
            given = arguments(trial, operation)
            for rank, observed in enumerate(seen):
                self._same_form(observed["result"], given[rank], f"rank {rank}, operation {index}")

    def _same_form(self, found: Any, given: Any, where: str) -> None:
        if isinstance(given, dict):
            self.require(
                isinstance(found, dict) and list(found) == list(given),
                f"{where}: {show(found)}, wanted keys {list(given)}",
            )
            for key in given:
                self._same_form(found[key], given[key], f"{where}[{key!r}]")
        elif isinstance(given, torch.Tensor):
            alike = isinstance(found, torch.Tensor) and found.dtype == given.dtype and found.shape == given.shape
            self.require(alike, f"{where}: {show(found)}, wanted {given.dtype}{tuple(given.shape)}")
        else:
            self.require(
                isinstance(found, (int, float)) and not isinstance(found, torch.Tensor),
                f"{where}: {show(found)}, wanted a number",
            )


@CONTRACT.add
class Gathering(Clause):
    """all_gather concatenates along dim 0 in rank order; numbers and 0-dim tensors give a 1-D tensor of length
    world_size; ranks may differ in dim 0 (also 0 rows), and in nothing else. At world size 1 it follows the same rule."""

    id = "COLL-4"

    @override
    def witnesses(self, place: Place) -> Sequence[Program]:
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
        alone += [{"tensor": "float32", "shape": [0, 2], "seed": 7}]
        return [Program(operations=tuple({"do": "all_gather", "data": it} for it in (data, *alone)))]

    @override
    def programs(self, place: Place) -> st.SearchStrategy[Program]:
        def ragged(dtype: str, rows: list[int], rest: list[int]) -> dict[str, Any]:
            return {"by_rank": [{"tensor": dtype, "shape": [count, *rest], "seed": count} for count in rows]}

        rows = st.lists(st.integers(0, 4), min_size=place.world, max_size=place.world)
        leaf = st.builds(
            ragged, st.sampled_from(FLOATING + INTEGERS + ["bool"]), rows, st.lists(st.integers(0, 3), max_size=2)
        )
        return nested(leaf | numbers()).map(lambda data: Program(operations=({"do": "all_gather", "data": data},)))

    @override
    def check(self, trial: Trial) -> None:
        for index, operation, seen in trial.each("all_gather"):
            expected = expected_gather(arguments(trial, operation))
            for rank, observed in enumerate(seen):
                self._compare(observed["result"], expected, f"rank {rank}, operation {index}")

    def _compare(self, found: Any, expected: Any, where: str) -> None:
        if isinstance(expected, dict):
            self.require(
                isinstance(found, dict) and list(found) == list(expected),
                f"{where}: {show(found)}, wanted keys {list(expected)}",
            )
            for key in expected:
                self._compare(found[key], expected[key], f"{where}[{key!r}]")
            return
        self.require(isinstance(found, torch.Tensor), f"{where}: {show(found)} is no tensor")
        alike = found.shape == expected.shape and torch.equal(found.to(expected.dtype), expected)
        self.require(alike, f"{where}: {show(found)}, wanted {show(expected)}")
        self.require(found.dtype == expected.dtype, f"{where}: dtype {found.dtype}, wanted {expected.dtype}")


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
    """An unknown op, or mismatched keys, dtypes or trailing shapes between ranks, or an integer or a sum of integers that
    does not fit 64 bits, raises on every rank; no rank hangs and no rank returns. Afterwards collectives work as before."""

    id = "COLL-5"
    smallest_world = 2

    @override
    def witnesses(self, place: Place) -> Sequence[Program]:
        return [self._program(place, call, what, 1) for what in BAD_PAIRS for call in ("all_reduce", "all_gather")] + [
            self._program(place, "all_reduce", "first dim", 1),
            *(self._reducing(*it) for it in ((1.0, "median"), ({"per_rank": [2**70, 1]}, "sum"), (2**62, "sum"))),
        ]

    def _reducing(self, data: Any, op: str) -> Program:
        operations = ({"do": "all_reduce", "data": data, "op": op, "may_fail": True}, *AFTERWARDS)
        return Program(operations=operations, settings={"timeout": 15.0}, seconds=40)

    def _program(self, place: Place, call: str, what: str, odd: int) -> Program:
        usual, other = (
            [{"tensor": "float32", "shape": [2], "seed": 1}, {"tensor": "float32", "shape": [3], "seed": 1}]
            if what == "first dim"
            else BAD_PAIRS[what]
        )
        data = {"by_rank": [other if rank == odd else usual for rank in range(place.world)]}
        return Program(
            operations=(
                {"do": call, "data": data, "may_fail": True, **({"op": "sum"} if call == "all_reduce" else {})},
                *AFTERWARDS,
            ),
            settings={"timeout": 15.0},
            seconds=40,
        )

    @override
    def programs(self, place: Place) -> st.SearchStrategy[Program]:
        return st.builds(
            lambda call, what, odd: self._program(place, call, what, odd),
            st.sampled_from(["all_reduce", "all_gather"]), st.sampled_from(sorted(BAD_PAIRS)), st.integers(0, place.world - 1),
        )  # fmt: skip

    @override
    def check(self, trial: Trial) -> None:
        for rank in range(trial.place.world):
            self.require(
                is_error(trial.at(rank, 0)),
                f"rank {rank} returned {show(trial.at(rank, 0))} where the ranks do not agree",
            )
            for index, operation in enumerate(AFTERWARDS, 1):
                self._check_after(trial.at(rank, index), operation, trial, rank)

    def _check_after(self, seen: Any, operation: Operation, trial: Trial, rank: int) -> None:
        where = f"rank {rank}: afterwards {operation['do']}"
        self.require(not is_error(seen), f"{where} raised {show(seen)}")
        given = arguments(trial, operation)
        wanted = expected_reduction(given, "sum") if operation["do"] == "all_reduce" else expected_gather(given)
        right = torch.equal(seen["result"], wanted.to(seen["result"].dtype))
        self.require(right, f"{where} gave {show(seen['result'])}, wanted {show(wanted)}")


AFTER: dict[str, Any] = {"tensor": "int64", "shape": [2], "seed": 8}
AFTERWARDS: list[Operation] = [
    {"do": "all_reduce", "data": AFTER, "op": "sum", "may_fail": True},
    {"do": "all_gather", "data": AFTER, "may_fail": True},
]


@CONTRACT.add
class HalfReduction(Reducing):
    """bf16 and fp16 are reduced in fp32."""

    id = "COLL-6"
    level = "SHOULD"
    smallest_world = 2

    @override
    def witnesses(self, place: Place) -> Sequence[Program]:
        halves = [[dtype, {"tensor": dtype, "shape": [64], "seed": 1}] for dtype in ("bfloat16", "float16")]
        large = ["large", {"tensor": "float16", "shape": [2], "fill": 40000.0}]  # whose sum fp16 cannot hold
        data = {"dict": [*halves, large]}
        return [Program(operations=tuple({"do": "all_reduce", "data": data, "op": op} for op in ("mean", "max")))]

    @override
    def check(self, trial: Trial) -> None:
        for index, operation, seen in trial.each("all_reduce"):
            given = arguments(trial, operation)
            for rank, observed in enumerate(seen):
                self.compare(
                    observed["result"],
                    expected_reduction(given, operation["op"]),
                    given[rank],
                    f"rank {rank}, {operation['op']} (operation {index})",
                )
