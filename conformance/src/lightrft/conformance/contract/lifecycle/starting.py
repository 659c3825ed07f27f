"""A new strategy: its process group, its place in the world, its settings and random numbers."""

from collections.abc import Sequence
from dataclasses import replace

from hypothesis import strategies as st
from typing_extensions import override

from lightrft.conformance.clause import (
    CONTRACT,
    Clause,
    Execution,
    Operation,
    Program,
    Record,
    Target,
    difference,
    same,
    show,
)
from lightrft.conformance.contract.program_parts import SUM, geometry

SEVERAL_PROCESSES: Sequence[dict[str, str]] = (
    {"RANK": "0", "WORLD_SIZE": "2"}, {"OMPI_COMM_WORLD_SIZE": "2"}, {"SLURM_STEP_NUM_TASKS": "2"},
)  # fmt: skip
"""The environment variables that launchers set for one of two processes."""


@CONTRACT.add
class Ready(Clause):
    """A strategy from get_strategy is ready to use. setup_distributed may be called again any number of times and
    changes nothing."""

    id = "LIFE-1"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        again = {"do": "setup_again"}
        operations = (
            SUM,
            again,
            SUM,
            {"do": "draw"},
            {"do": "random_state"},
            {"do": "resources", "remember": "once"},
            again,
            again,
            {"do": "resources", "compare": "once"},
            {"do": "random_state"},
            SUM,
        )
        return [Program(operations=operations)]

    @override
    def check(self, execution: Execution) -> None:
        total = float(sum(1 + rank for rank in range(execution.target.world)))
        for index, _, seen in execution.each("all_reduce"):
            self.require(
                all(observed["result"] == total for observed in seen),
                f"all_reduce (operation {index}): expected {total}, got {show(seen)}",
            )
        for rank, grown in enumerate(execution.last("resources")):
            self.require(
                not (grown["threads"] > 0 or grown["files"] > 0 or grown["environment"]),
                f"rank {rank}: setup_distributed added {show(grown)}",
            )
        before, after = [seen for _, _, seen in execution.each("random_state")]
        self.require(before == after, "setup_distributed advanced a random number generator")


@CONTRACT.add
class WorldInfo(Clause):
    """world_size, get_rank() and is_rank_0() agree with the process group. Without one they are 1, 0 and True, and the
    strategy sets no environment variable, creates no process group, and refuses to be one of several processes of torchrun,
    mpirun or srun. A distributed strategy started without a launcher runs as a world of size 1."""

    id = "LIFE-2"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        plain = Program(operations=({"do": "world"},), settings=geometry(target, 3))
        if not target.grouped:
            refused = {"do": "world", "may_fail": True}
            return [
                plain,
                *(Program(operations=({"do": "environ", **variables}, refused)) for variables in SEVERAL_PROCESSES),
            ]
        if target.device != "cpu":
            return [plain]
        # each rank alone on its host, and then an environment that contradicts the process group
        first, changed = ({"do": "environ", name: "0"} for name in ("LOCAL_RANK", "RANK"))
        return [plain, replace(plain, operations=(first, {"do": "world"}, changed, {"do": "world"}))]

    @override
    def check(self, execution: Execution) -> None:
        for _, operation, places in execution.each("world"):
            if operation.get("may_fail"):
                for rank, seen in enumerate(places):
                    self.require_error(seen, "ConfigError", "2", where=f"rank {rank}, one of 2 processes")
                continue
            self._check(execution, places)

    def _check(self, execution: Execution, places: list[Record]) -> None:
        for rank, seen in enumerate(places):
            expected = (execution.target.world, rank, rank == 0)
            reported = (seen["world_size"], seen["rank"], seen["is_rank_0"])
            self.require(
                reported == expected,
                f"rank {rank}: expected (world_size, rank, is_rank_0) = {expected}, got {reported}",
            )
            self.require(
                seen["accumulation_steps"] == 3,
                f"rank {rank}: expected accumulated_gradient=3, got {seen['accumulation_steps']}",
            )
            if execution.target.grouped:
                self.require(
                    seen["group"] == [execution.target.world, rank],
                    f"rank {rank}: expected the process group {[execution.target.world, rank]}, got {seen['group']}",
                )
            else:
                self.require(
                    seen["group"] is None and not seen["environment"],
                    f"expected no process group and no variables, got {seen['group']} and {seen['environment']}",
                )


@CONTRACT.add
class Seeds(Clause):
    """set_seed makes the random numbers of Python, NumPy and torch reproducible."""

    id = "LIFE-4"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        return [self._program(0), self._program(2**32 - 1)]

    def _program(self, seed: int) -> Program:
        again: list[Operation] = [{"do": "seed", "value": seed}, {"do": "draw"}]
        return Program(
            operations=(*again, {"do": "draw"}, *again, {"do": "seed", "value": (seed + 1) % 2**32}, {"do": "draw"})
        )

    @override
    def programs(self, target: Target) -> st.SearchStrategy[Program]:
        return st.integers(0, 2**32 - 1).map(self._program)

    @override
    def check(self, execution: Execution) -> None:
        draws = [seen for _, _, seen in execution.each("draw")]
        for rank in range(execution.target.world):
            first, second, again, other = [draw[rank] for draw in draws]
            self.require(same(first, again), f"rank {rank}: the same seed: {difference(first, again)}")
            for stream, (left, right, third) in enumerate(zip(first, second, other, strict=True)):
                name = ("Python's", "NumPy's", "torch's")[stream]
                self.require(
                    not same(left, right) and not same(left, third),
                    f"rank {rank}: {name} random numbers do not change, or do not depend on the seed",
                )


@CONTRACT.add
class LocalRank(Clause):
    """An explicit local_rank takes precedence over the environment."""

    id = "LIFE-6"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        operations = (
            {"do": "environ", "LOCAL_RANK": "63"},
            {"do": "settings", "names": ["local_rank"]},
            SUM,
            {"do": "local_device"},
        )
        return [Program(operations=operations, settings={"local_rank": 0})]

    @override
    def check(self, execution: Execution) -> None:
        for rank in range(execution.target.world):
            local_rank, index = execution.at(rank, 3)
            fits = local_rank == 0 and index in (None, 0)
            self.require(fits, f"rank {rank}: expected local_rank=0 and device 0 or none, got {local_rank} and {index}")


@CONTRACT.add
class BatchSizes(Clause):
    """Batch sizes that do not divide evenly raise ConfigError on every rank. The message states the numbers and the
    rule."""

    id = "LIFE-7"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        return [self._program(target, 3, 3 * target.world + 1)] + (
            [self._program(target, 2, 2)] if target.world > 1 else []
        )

    def _program(self, target: Target, micro: int, total: int) -> Program:
        return Program(
            operations=({"do": "world", "may_fail": True},),
            settings={"micro_train_batch_size": micro, "train_batch_size": total},
        )

    @override
    def programs(self, target: Target) -> st.SearchStrategy[Program]:
        # on one rank, a partial micro-batch; on several, a different number of micro-batches per rank
        micro, count = st.integers(2, 6), st.integers(1, 20)
        if target.world == 1:
            return st.builds(lambda size, n: self._program(target, size, size * n + 1), micro, count)
        return st.builds(lambda size, n: self._program(target, size, size * (n * target.world + 1)), micro, count)

    @override
    def check(self, execution: Execution) -> None:
        micro, total = (
            str(execution.program.settings[name]) for name in ("micro_train_batch_size", "train_batch_size")
        )
        for rank in range(execution.target.world):
            self.require_error(
                execution.at(rank, 0), "ConfigError", "train_batch_size", micro, total, where=f"rank {rank}"
            )
