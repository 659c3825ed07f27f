"""PREP: buffers that training changes."""

from collections.abc import Sequence

from typing_extensions import override

from lightrft.conformance.clause import CONTRACT, Clause, Execution, Operation, Program, Target, same
from lightrft.conformance.contract import tolerances
from lightrft.conformance.contract.program_parts import program, trained, updates
from lightrft.conformance.contract.reference_checks import assert_close


def read_buffers(model: str = "a") -> Operation:
    """The buffers of a model."""
    return {"do": "buffers", "model": model}


def assert_buffers(clause: Clause, execution: Execution) -> None:
    """Require the buffers, whenever a program reads them, to match the reference's on each rank, within rounding."""
    for index, operation, seen in execution.each("buffers"):
        for rank, (buffers, expected) in enumerate(zip(seen, execution.predicted()[index], strict=True)):
            mismatch = tolerances.absolute(buffers, expected)
            clause.require(
                mismatch is None,
                f"rank {rank}, buffers (operation {index}) of model {operation['model']}: {mismatch}",
            )


@CONTRACT.add
class RankLocalBuffers(Clause):
    """Buffers that forward changes stay each rank's own. Updates, moving averages, reading weights, saving, offloading
    and evaluation neither exchange them between ranks nor change them, apart from what forward itself does."""

    id = "PREP-18"
    smallest_world = 2

    @override
    def pinned_examples(self, target: Target) -> Sequence[Program]:
        average: list[Operation] = [
            {"do": "build", "model": "e", "kind": "running statistics", "seed": 4},
            {"do": "prepare_inference", "model": "e"},
        ]
        uses: list[Operation] = [
            {"do": "average", "model": "a", "into": "e", "beta": 0.9},
            {"do": "save", "model": "a", "tag": "t"},
            {"do": "offload_model", "model": "a"},
            {"do": "reload_model", "model": "a"},
            {"do": "forward", "model": "a", "batch": 7},
        ]
        looks = [{"do": "weights", "model": "a"}, read_buffers(), read_buffers("e")]
        setup = [*trained(kind="running statistics", seed=4), *average, *looks]
        return [
            program(
                target, {"do": "empty_disk"}, *setup, *updates(2, 2), *looks, *uses, *looks, *updates(1, 2, first=9),
                *looks, {"do": "empty_disk", "keep": False}, accumulation_steps=2,
            )
        ]  # fmt: skip

    @override
    def check(self, execution: Execution) -> None:
        assert_buffers(self, execution)
        assert_close(self, execution)
        last = execution.last_of("buffers", -2)
        self.require(not same(last[0], last[-1]), "expected ranks that saw other batches to have other buffers")
