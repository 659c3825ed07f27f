"""OFF: offloading optimizers and models, and reloading them."""

from collections.abc import Sequence

from hypothesis import strategies as st
from typing_extensions import override

from lightrft.conformance.clause import CONTRACT, Clause, Execution, Operation, Program, Settings, Target
from lightrft.conformance.contract.program_parts import BF16, FP32, SEEDS, geometry, micro_batch, trained, updates
from lightrft.conformance.contract.reference_checks import READ_STATE, READ_WEIGHTS, FollowsReference

OFFLOAD: list[Operation] = [{"do": "offload_optimizer", "model": "a"}, {"do": "offload_model", "model": "a"}]
RELOAD: list[Operation] = [{"do": "reload_model", "model": "a"}, {"do": "load_optimizer", "model": "a"}]


def settings(target: Target, precision: Settings = FP32) -> dict[str, object]:
    """Settings under which the optimizer can be offloaded."""
    offload = {} if target.settings.get("fsdp_cpu_offload") else {"adam_offload": True}
    return {**precision, **offload, **geometry(target)}


@CONTRACT.add
class BitExactOffload(Clause):
    """Offloading and reloading an optimizer or a model preserves every bit. Both are idempotent."""

    id = "OFF-1"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        return [self._program(target, FP32), self._program(target, BF16)]

    def _program(self, target: Target, precision: Settings, seed: int = 2, count: int = 2) -> Program:
        cycle = [*OFFLOAD, *OFFLOAD, *RELOAD, *RELOAD]
        operations = (*trained(seed=seed), *updates(count), READ_STATE, *cycle, READ_STATE, *cycle, READ_STATE)
        return Program(operations=operations, settings=settings(target, precision))

    @override
    def programs(self, target: Target) -> st.SearchStrategy[Program]:
        return st.builds(lambda seed, count: self._program(target, FP32, seed, count), SEEDS, st.integers(0, 3))

    @override
    def check(self, execution: Execution) -> None:
        first, *others = [seen for _, _, seen in execution.each("state")]
        for other in others:
            for rank in range(execution.target.world):
                for part in ("parameters", "optimizer"):
                    self.require_same(
                        first[rank][part], other[rank][part], f"rank {rank}: offloading and reloading changed {part}"
                    )


@CONTRACT.add
class OffloadedTraining(FollowsReference):
    """Offloading between updates, or between the micro-batches of one update, does not change the result of
    training."""

    id = "OFF-2"

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        return [self._program(target, [0, 1, 2]), self._program(target, [3]), self._inside(target)]

    def _inside(self, target: Target) -> Program:
        """Offload while a gradient is pending."""
        first, second = micro_batch(1), micro_batch(2)
        operations = (
            *trained(seed=3),
            *updates(1, 2),
            *first,
            *OFFLOAD,
            *RELOAD,
            *second,
            *updates(1, 2, first=9),
            READ_WEIGHTS,
        )
        return Program(operations=operations, settings={**settings(target), **geometry(target, 2)})

    def _program(self, target: Target, turns: Sequence[int], seed: int = 3) -> Program:
        operations = trained(seed=seed)
        for number, turn in enumerate(turns):
            cycle = [[*OFFLOAD, *RELOAD], OFFLOAD[:1], [OFFLOAD[1], RELOAD[0]], [*OFFLOAD, *RELOAD, *OFFLOAD, *RELOAD]][
                turn
            ]
            operations += [*updates(1, first=10 * number), *cycle]
        return Program(operations=(*operations, *updates(2, first=90), READ_WEIGHTS), settings=settings(target))

    @override
    def programs(self, target: Target) -> st.SearchStrategy[Program]:
        return st.builds(
            lambda turns, seed: self._program(target, turns, seed),
            st.lists(st.integers(0, 3), min_size=1, max_size=4),
            SEEDS,
        )


@CONTRACT.add
class FreedMemory(Clause):
    """Offloading frees at least 95 % of the memory that the object used on the device."""

    id = "OFF-3"
    needs_cuda = True

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        look: Operation = {"do": "device_bytes"}
        operations = (look, *trained(kind="wide"), look, *updates(1), look, OFFLOAD[0], look, OFFLOAD[1], look)
        return [Program(operations=operations, settings=settings(target))]

    @override
    def check(self, execution: Execution) -> None:
        empty, model, trained_, without_optimizer, without_both = [
            seen for _, _, seen in execution.each("device_bytes")
        ]
        for rank in range(execution.target.world):
            held = trained_[rank] - model[rank]
            self.require(
                trained_[rank] - without_optimizer[rank] >= 0.95 * held,
                f"rank {rank}: offloading the optimizer freed {trained_[rank] - without_optimizer[rank]} of {held} bytes, expected 95 %",
            )
            held = model[rank] - empty[rank]
            back = without_optimizer[rank] - without_both[rank]
            self.require(
                back >= 0.95 * held, f"rank {rank}: offloading the model freed {back} of {held} bytes, expected 95 %"
            )
